"""Studies of a sweep that share a device, in one process: with ``launcher=local`` on a GPU, or ``together=N``.

Hydra's launcher only composes and checks them; what they are stands in each one's ``outcome.json``. They run when the
launcher is through: those of one device in one process, as many at once as ``together`` says.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from rethink_prune.commands.sweeps import Outcome, write_outcome
from rethink_prune.errors import UserError
from rethink_prune.study.prepare import check_config
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.runtime import prepare_runtime
from rethink_prune.training.together import ALONE_ONLY, MOST_AT_ONCE, train_together
from rethink_prune.turns import number_at_once

_FORMAT = "[%(asctime)s]%(job)s[%(name)s][%(levelname)s] - %(message)s"
# Of the job that this thread, or the one that started it, runs.
_number: ContextVar[int | None] = ContextVar("number", default=None)


def run_packed(jobs: Sequence[Outcome]) -> None:
    """Run studies that were left for the end of a multirun; what becomes of each is in its ``outcome.json``.

    Parameters
    ----------
    jobs : sequence of mapping
        The contents of their ``outcome.json``, and ``folder``.
    """
    packs: dict[tuple[str, bool], list[Outcome]] = defaultdict(list)
    for job in jobs:
        # Whether operations are deterministic is set for a whole process.
        packs[job["study"]["device"], job["study"]["deterministic"]].append(job)
    if len(packs) == 1:
        run_pack(jobs)
        return
    # The launcher that left them here is joblib's. Imported here: it is an extra.
    from joblib import Parallel, delayed

    devices = {device for device, _ in packs}
    # A process that has used CUDA otherwise cannot become deterministic.
    in_order = [pack for _, pack in sorted(packs.items(), key=lambda item: not item[0][1])]
    with Interrupts() as interrupts:
        # The terminal's Ctrl-C reaches the other processes as well, which save and stop.
        with interrupts.deferred():
            Parallel(n_jobs=len(devices))(delayed(run_pack)(pack) for pack in in_order)
        if interrupts.requested is not None:
            interrupts.stop("in a sweep")


def run_pack(jobs: Sequence[Outcome]) -> None:
    """Run studies in this process, some at once."""
    study = jobs[0]["study"]
    try:
        runtime = prepare_runtime(study["device"], study["precision"], deterministic=study["deterministic"])
    except UserError as error:
        for job in jobs:
            with write_outcome(job["folder"], job["job"], job["overrides"]):
                raise error
        return
    wishes = [job["study"]["together"] for job in jobs]
    at_once = max(MOST_AT_ONCE if wish == "auto" else wish for wish in wishes)
    _log_to_the_terminal()
    with Interrupts() as interrupts:
        works = [partial(_run_job, job, interrupts) for job in jobs]
        train_together(works, at_once=at_once, device=runtime.device)


def _run_job(job: Outcome, interrupts: Interrupts) -> None:
    folder: Path = job["folder"]
    number = _number.set(job["job"])
    handler = logging.FileHandler(folder / "rethink_prune.log")
    handler.setFormatter(_Numbered(_FORMAT))
    handler.addFilter(lambda record: _number.get() == job["job"])
    logging.getLogger().addHandler(handler)
    needs_device = None
    try:
        with write_outcome(folder, job["job"], job["overrides"]) as outcome:
            try:
                run_study(check_config(job["study"]), folder, interrupts, experiment=job["experiment"])
            except ALONE_ONLY as error:
                if number_at_once() == 1:
                    raise
                outcome["state"], needs_device = "running", error
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        _number.reset(number)
    if needs_device is not None:
        raise needs_device


class _Numbered(logging.Formatter):
    """Writes the number of the job that a line is about, as Hydra counts them."""

    def format(self, record: logging.LogRecord) -> str:
        number = _number.get()
        record.job = "" if number is None else f"[#{number}]"
        return super().format(record)


def _log_to_the_terminal() -> None:
    """Let the log go to the terminal alone, whatever Hydra has set up for the job that ran last."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
    if not root.handlers:
        root.addHandler(logging.StreamHandler(sys.stdout))
    for handler in root.handlers:
        handler.setFormatter(_Numbered(_FORMAT))
    root.setLevel(logging.INFO)
