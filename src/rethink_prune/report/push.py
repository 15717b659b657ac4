"""Send finished trainings of many runs to trackers, as their studies would have done."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from rethink_prune.config import TRACKERS
from rethink_prune.errors import UserError, suggestion
from rethink_prune.report.gather import GatheredRuns
from rethink_prune.report.records import RunRecord
from rethink_prune.store.metrics import read_metrics
from rethink_prune.store.stage import Stage
from rethink_prune.tracking.sender import Trackers, missing_trackers
from rethink_prune.tracking.trackers import TrackedRun, tracked_run


def push_runs(gathered: GatheredRuns, names: Sequence[str]) -> list[str]:
    """Send what is finished; return what became of it, in words. What a tracker has already is not sent again.

    Parameters
    ----------
    gathered : GatheredRuns
    names : sequence of str
        The trackers; none: those that the studies were given, or else the one that is installed.

    Raises
    ------
    UserError
        If a tracker is not known or not installed, it is not clear which one is meant, or one does not take the runs.
    """
    # Own ones have to be typed: what a summary names is never imported.
    given = dict.fromkeys(name for run in gathered.runs for name in run.study.tracker if name in TRACKERS)
    names = _chosen(names or tuple(given))
    runs: dict[Path, dict[str, TrackedRun]] = defaultdict(dict)
    for record in gathered.runs:
        for run in _finished_runs(record, gathered):
            # Several runs may use a stage: it belongs to the first, as when they were trained.
            runs[gathered.stages[run.id].parents[1]].setdefault(run.id, run)
    said, problems = [*gathered.problems], []
    for store, found in runs.items():
        with Trackers(names, store / "trackers", patient=True) as trackers:
            for run in found.values():
                trackers.send(run, read_metrics(gathered.stages[run.id]), "finished")
        for name, sender in trackers.senders.items():
            new = sum(epochs > 0 for epochs in sender.sent.values())
            said.append(f"{name}: {new} of {len(found)} trainings were new, from {store}")
            problems += [f"tracker={name}: {sender.problem}"] if sender.problem else []
    if problems:
        raise UserError("\n".join(problems))
    return said or ["nothing to send: no finished training of these runs is there"]


def _chosen(names: Sequence[str]) -> Sequence[str]:
    installed = [name for name in TRACKERS if not missing_trackers([name])]
    if not names and len(installed) == 1:
        return installed
    if not names and installed:
        raise UserError(
            f"--push: these runs name no tracker; name one of {', '.join(installed)}: --tracker {installed[0]}"
        )
    for name in names or TRACKERS[:1]:
        if name not in TRACKERS and ":" not in name:
            raise UserError(f"--tracker {name}: no such tracker; {suggestion(name, TRACKERS)}")
        if missing_trackers([name]):
            install = f'pip install "rethink-prune[{name}]"'
            raise UserError(f"--tracker {name}: is not installed; {install}")
    return names


def _finished_runs(record: RunRecord, gathered: GatheredRuns) -> Iterator[TrackedRun]:
    """Yield the trainings of a run that are finished, and still there."""
    early = {"early": record.early} if record.early else {}
    detectors = {f"detect_{name}": entry for name, entry in record.transfer.items()}
    entries = {**record.trained, **early, **detectors}
    stages = {title: (entry.stage, entry.flops_before) for title, entry in entries.items()}
    stages |= {f"round_{entry.round}": (entry.trained_stage, None) for entry in record.rounds}
    for title, (name, before) in stages.items():
        if name not in gathered.stages:
            continue
        status = Stage(gathered.stages[name]).status()
        if status.get("state") != "done":
            continue
        result = status["result"]
        images = sum(row["images"] for row in read_metrics(gathered.stages[name]))
        # A stage that took given weights has no epochs.
        if images:
            size = {part: result.get(part) for part in ("params", "macs", "epochs")}
            per_image = result["train_flops"] / images
            study = record.study.model_dump()
            yield tracked_run(study, title, name, **size, flops_before=before, flops_per_image=per_image)
