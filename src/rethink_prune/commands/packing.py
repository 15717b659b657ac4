"""Studies of a sweep that share a device, in one process: with ``launcher=local`` on a GPU, or ``together=N``.

Hydra's launcher only composes and checks them; what they are stands in each one's ``outcome.json``. They run when the
launcher is through: those of one device in one process, as many at once as ``together`` says.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rethink_prune.commands.sweeps import Outcome, write_outcome
from rethink_prune.study.prepare import check_config
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.runtime import prepare_runtime
from rethink_prune.training.together import MOST_AT_ONCE, train_together

_FORMAT = "[%(asctime)s][%(threadName)s][%(name)s][%(levelname)s] - %(message)s"


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
    Parallel(n_jobs=len(devices))(delayed(run_pack)(pack) for pack in in_order)


def run_pack(jobs: Sequence[Outcome]) -> None:
    """Run studies in this process, some at once."""
    study = jobs[0]["study"]
    runtime = prepare_runtime(study["device"], study["precision"], deterministic=study["deterministic"])
    wishes = [job["study"]["together"] for job in jobs]
    at_once = max(MOST_AT_ONCE if wish == "auto" else wish for wish in wishes)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
    with Interrupts() as interrupts:
        works = [partial(_run_job, job, interrupts) for job in jobs]
        train_together(works, at_once=at_once, device=runtime.device)


def _run_job(job: Outcome, interrupts: Interrupts) -> None:
    folder: Path = job["folder"]
    thread = threading.current_thread()
    name, thread.name = thread.name, f"#{job['job']}"  # as Hydra numbers it; the log says it in every line
    handler = logging.FileHandler(folder / "rethink_prune.log")
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(lambda record: record.thread == thread.ident)
    logging.getLogger().addHandler(handler)
    try:
        with write_outcome(folder, job["job"], job["overrides"]):
            run_study(check_config(job["study"]), folder, interrupts, experiment=job["experiment"])
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        thread.name = name
