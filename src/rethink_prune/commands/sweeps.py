"""Multiruns: which GPU a job takes, what became of every job, and jobs that a cluster requeues.

Hydra ends a multirun with the error of the first job that failed. Here a job writes its failure beside its results, to
``outcome.json``, and ends as a success for Hydra; after the last job, the command lists those that failed.
"""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from rethink_prune.errors import Interrupted, Refused, UserError
from rethink_prune.files import write_json
from rethink_prune.training.interrupts import SIGNALS

log = logging.getLogger(__name__)

Outcome = Mapping[str, Any]
OUTCOME_FILE = "outcome.json"
PLANNED = "planned"  # the state of a job that is left for the end of its multirun
MOST_DEATHS = 3  # of one job on Ray
# Of the multirun that this process has started. Hydra's own record of it is gone, or of its last job, when it ends.
_sweep_folder: ContextVar[Path | None] = ContextVar("sweep_folder", default=None)


def job_device(number: int, gpus: int) -> str:
    """Return the device of a job among `gpus`: jobs take turns by number; ``auto`` where there are no GPUs.

    Examples
    --------
    >>> [job_device(number, gpus=2) for number in range(3)]
    ['cuda:0', 'cuda:1', 'cuda:0']
    """
    return f"cuda:{number % gpus}" if gpus else "auto"


def choose_device(device: str, run: HydraConf) -> str:
    """Return the device of a study that is configured with `device`: of ``auto`` in jobs of joblib, a GPU by number."""
    # Batch systems show a job only its own GPUs; joblib's processes all see the same ones.
    if device != "auto" or run.mode != RunMode.MULTIRUN or run.runtime.choices["hydra/launcher"] != "joblib":
        return device
    return job_device(run.job.num, _count_gpus())


def _count_gpus() -> int:
    # Imported here: it takes seconds, and only some launchers ask.
    import torch

    return torch.cuda.device_count()


# For conf/launcher: as many jobs at once as there are GPUs, or cores (-1) where there are none; GPUs of one job.
OmegaConf.register_new_resolver("jobs_at_once", lambda: _count_gpus() or -1, replace=True)
OmegaConf.register_new_resolver("gpus_of_a_job", lambda: min(1, _count_gpus()), replace=True)


class StartSweep(Callback):
    """Prepares :func:`raise_if_jobs_failed`; ``conf/config.yaml`` names this class."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the multirun's folder, and remove the outcomes that an earlier one left in it."""
        sweep = Path(config.hydra.sweep.dir).absolute()
        _sweep_folder.set(sweep)
        for file in sweep.rglob(OUTCOME_FILE):
            file.unlink()
        if config.hydra.runtime.choices["hydra/launcher"] == "ray":
            # The processes of Ray's machines start in other folders. From these overrides, Hydra composes each job.
            with read_write(config.hydra):
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{sweep}'")


@contextmanager
def record_outcome(run: HydraConf) -> Iterator[dict[str, Any]]:
    """Run the body as a job of a multirun: write an error to the log and to ``outcome.json`` instead of raising it.

    Outside of a multirun, errors pass, a `UserError` as `Refused`. What the body puts into the mapping that it gets is
    written as well. For a job that Ray has started again because its process or machine died, it holds how often
    (``deaths``).
    """
    if run.mode != RunMode.MULTIRUN:
        try:
            yield {}
        except UserError as error:
            _remove_unused(Path(run.runtime.output_dir))
            raise Refused(error) from error.__cause__
        return
    folder = Path(run.runtime.output_dir)
    deaths = _count_deaths(folder) if run.runtime.choices["hydra/launcher"] == "ray" else 0
    with write_outcome(
        folder, run.job.num, list(run.overrides.task), **({"deaths": deaths} if deaths else {})
    ) as outcome:
        yield outcome


def _remove_unused(folder: Path) -> None:
    """Remove a run folder below the current one, and folders that this leaves empty, if only Hydra wrote to it."""
    if Path.cwd() in folder.parents and {path.name for path in folder.iterdir()} <= {".hydra", "rethink_prune.log"}:
        shutil.rmtree(folder)
        with suppress(OSError):  # of the first that holds something else
            for parent in folder.relative_to(Path.cwd()).parents[:-1]:
                parent.rmdir()


def _count_deaths(folder: Path) -> int:
    # The multirun starts without outcomes: this one is from an earlier try.
    file = folder / OUTCOME_FILE
    earlier = json.loads(file.read_text()) if file.exists() else {}
    return int(earlier.get("deaths", 0)) + int(earlier.get("state") == "running")


def refuse_after_deaths(outcome: Outcome) -> None:
    """Raise `UserError` in a job that Ray starts once more although its process has died several times.

    Ray itself would give up with an error that ends the whole multirun, and so the jobs beside it.

    Examples
    --------
    >>> refuse_after_deaths({"state": "done", "deaths": 3})
    Traceback (most recent call last):
        ...
    rethink_prune.errors.UserError: its process or machine died 3 times (killed, or out of memory?)
    """
    if outcome.get("deaths", 0) >= MOST_DEATHS:
        raise UserError(f"its process or machine died {outcome['deaths']} times (killed, or out of memory?)")


@contextmanager
def write_outcome(folder: Path, number: int, overrides: Sequence[str], **more: Any) -> Iterator[dict[str, Any]]:
    """Run the body as a job, and write to ``outcome.json`` in its folder what became of it, and `more`."""
    file, job = folder / OUTCOME_FILE, {"job": number, "overrides": list(overrides), **more}
    outcome = {"state": "done", **more}
    # A job whose process is killed leaves this.
    write_json(file, {**job, "state": "running"})
    try:
        yield outcome
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        reason = str(error) if is_user_error else f"{type(error).__name__}: {error}"
        log.error("job %s failed: %s", number, reason, exc_info=not is_user_error)
        write_json(file, {**job, "state": "failed", "reason": reason})
    else:
        write_json(file, {**job, **outcome})


@contextmanager
def raise_if_jobs_failed(run_packed: Callable[[Sequence[Outcome]], None]) -> Iterator[None]:
    """Run the body, which may be a multirun, and raise `UserError` with a list of the jobs that failed.

    Parameters
    ----------
    run_packed : callable
        Runs the jobs that were left for the end, if any: it gets their ``outcome.json``, and their folders.
    """
    try:
        yield
    except Exception as error:
        # A launcher gave up.
        try:
            _end_sweep(run_packed)
        except UserError as failed:
            raise UserError(f"{failed}\nthe launcher ended with {type(error).__name__}: {error}") from error
        raise
    _end_sweep(run_packed)


def _end_sweep(run_packed: Callable[[Sequence[Outcome]], None]) -> None:
    sweep = _sweep_folder.get()
    if sweep is None:
        return
    planned = [job for job in _outcomes(sweep) if job["state"] == PLANNED]
    if planned:
        try:
            run_packed(sorted(planned, key=lambda job: job["job"]))
        except Exception:
            log.exception("a process with several jobs ended")
    jobs = _outcomes(sweep)
    failed = sorted((job for job in jobs if job["state"] != "done"), key=lambda job: job["job"])
    if failed:
        lines = [f"{len(failed)} of {len(jobs)} jobs failed; the same command again does only what is missing:"]
        for job in failed:
            reason = job.get("reason", f"ended without a word (killed, or out of memory?); see {job['folder']}")
            lines += [f"#{job['job']} {' '.join(job['overrides'])}", *(f"    {line}" for line in reason.splitlines())]
        raise UserError("\n".join(lines))


def _outcomes(sweep: Path) -> list[Outcome]:
    return [{**json.loads(file.read_text()), "folder": file.parent} for file in sweep.rglob(OUTCOME_FILE)]


def is_packed(plain: Mapping[str, Any], run: HydraConf) -> bool:
    """Tell whether a job is left for the end of its multirun, to share a device with others in one process."""
    if run.mode != RunMode.MULTIRUN or run.runtime.choices["hydra/launcher"] != "joblib" or plain["dry_run"]:
        return False
    if plain["together"] == "auto":
        return plain["device"] != "cpu" and _count_gpus() > 0
    return isinstance(plain["together"], int) and plain["together"] > 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals on which a study saves and stops; in a job of submitit, the one before a requeue as well.

    Examples
    --------
    >>> [number.name for number in stop_signals()]
    ['SIGINT', 'SIGTERM']
    """
    return (*SIGNALS, signal.SIGUSR2) if _in_submitit_job() else SIGNALS


@contextmanager
def wait_for_requeue() -> Iterator[None]:
    """Run the body; in a job of submitit that a signal has stopped, leave it to the cluster to end the job.

    Before its time limit, a job gets SIGUSR2, on which submitit's own handler requeues and ends it. SIGTERM comes some
    time before a kill, after which Slurm starts a preempted job again: not if the job has ended by itself.
    """
    try:
        yield
    except Interrupted as stop:
        if not _in_submitit_job() or stop.signum == signal.SIGINT:
            raise
        log.info("%s", stop)
        # The study's own handler is gone by now, and submitit's is back in its place.
        if stop.signum == signal.SIGUSR2:
            signal.raise_signal(signal.SIGUSR2)
        # Until the kill, or SIGUSR2.
        while True:
            signal.pause()


def _in_submitit_job() -> bool:
    return "SUBMITIT_EXECUTOR" in os.environ
