"""Multiruns: which GPU a job takes, what became of every job, and jobs that are requeued.

Hydra ends a multirun with the error of the first job that failed. Here a job notes its failure beside its results, in
``outcome.json``, and ends well for Hydra; when all have ended, the command lists those that failed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rethink_prune.errors import Interrupted, UserError
from rethink_prune.files import write_json

log = logging.getLogger(__name__)

OUTCOME_FILE = "outcome.json"


def job_device(number: int, gpus: int) -> str:
    """Return the device of a job among `gpus`: they take turns by job number; ``auto`` where there are none."""
    return f"cuda:{number % gpus}" if gpus else "auto"


def choose_device(device: str, run: HydraConf) -> str:
    """Return the device of a study that is configured with `device`: of ``auto`` in jobs of joblib, a GPU by number."""
    if device != "auto" or run.mode != RunMode.MULTIRUN or run.runtime.choices["hydra/launcher"] != "joblib":
        return device
    return job_device(run.job.num, _count_gpus())


def _count_gpus() -> int:
    import torch  # takes seconds, and only some launchers ask

    return torch.cuda.device_count()


# For conf/launcher: as many jobs at once as there are GPUs, or cores (-1) where there are none; GPUs of one job.
OmegaConf.register_new_resolver("jobs_at_once", lambda: _count_gpus() or -1, replace=True)
OmegaConf.register_new_resolver("gpus_of_a_job", lambda: min(1, _count_gpus()), replace=True)


class StartSweep(Callback):
    """Makes a multirun's configuration known to :func:`judged`, and its folder free of an earlier one's outcomes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Set what ``HydraConfig`` returns outside of jobs."""
        HydraConfig.instance().set_config(config)
        for file in Path(config.hydra.sweep.dir).rglob(OUTCOME_FILE):
            file.unlink()


@contextmanager
def noted(run: HydraConf) -> Iterator[None]:
    """Run the body as a job of a multirun: an error is logged and noted, and ends this job only.

    Outside of a multirun, errors pass.
    """
    if run.mode != RunMode.MULTIRUN:
        yield
        return
    file = Path(run.runtime.output_dir) / OUTCOME_FILE
    job = {"job": run.job.num, "overrides": list(run.overrides.task)}
    write_json(file, {**job, "state": "running"})
    try:
        yield
    except Exception as error:
        own = isinstance(error, UserError)
        reason = str(error) if own else f"{type(error).__name__}: {error}"
        log.error("job %s failed: %s", run.job.num, reason, exc_info=not own)
        write_json(file, {**job, "state": "failed", "reason": reason})
    else:
        write_json(file, {**job, "state": "done"})


@contextmanager
def judged() -> Iterator[None]:
    """Run the body, which may be a multirun, and raise `UserError` with a list of the jobs that failed."""
    try:
        yield
    except SystemExit:  # a launcher gave up, and Hydra has said why
        _check_jobs()
        raise
    _check_jobs()


def _check_jobs() -> None:
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    files = Path(HydraConfig.get().sweep.dir).rglob(OUTCOME_FILE)
    jobs = [{**json.loads(file.read_text()), "folder": file.parent} for file in files]
    jobs.sort(key=lambda job: job["job"])
    failed = [job for job in jobs if job["state"] != "done"]
    if failed:
        lines = [f"{len(failed)} of {len(jobs)} jobs failed; the same command again does only what is missing:"]
        for job in failed:
            reason = job.get("reason", f"ended without a word (killed, or out of memory?); see {job['folder']}")
            lines += [f"#{job['job']} {' '.join(job['overrides'])}", *(f"    {line}" for line in reason.splitlines())]
        raise UserError("\n".join(lines))


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals on which a study saves and stops; in a job of submitit, that it is requeued on is one."""
    usual = (signal.SIGINT, signal.SIGTERM)
    return (*usual, signal.SIGUSR2) if _in_submitit() else usual


@contextmanager
def left_to_submitit() -> Iterator[None]:
    """Run the body; once a signal has stopped it in a job of submitit, leave what becomes of the job to the scheduler.

    Before its time limit, a job gets SIGUSR2, on which submitit's own handler requeues and ends it. SIGTERM comes some
    time before a kill, after which Slurm starts a preempted job again: not if the job has ended by itself.
    """
    try:
        yield
    except Interrupted as stop:
        if _in_submitit() and stop.signum != signal.SIGINT:
            log.info("%s", stop)
            if stop.signum == signal.SIGUSR2:
                signal.raise_signal(signal.SIGUSR2)
            while True:
                signal.pause()  # until the kill, or SIGUSR2
        raise


def _in_submitit() -> bool:
    return "SUBMITIT_EXECUTOR" in os.environ
