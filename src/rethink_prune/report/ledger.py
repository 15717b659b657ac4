"""What a trained network costs where several rows build on one large network, and how its training is written down."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rethink_prune.report.records import RunRecord, TrainedRecord, TrainingRecord
from rethink_prune.study.arms import known_arm


def shared_networks(groups: Iterable[Sequence[RunRecord]]) -> dict[str, int]:
    """Return how many groups of runs build on each network, by its stage."""
    users: dict[str, int] = {}
    for runs in groups:
        stages = {base.stage for run in runs for arm in run.arms for base in _ancestors(run, arm) if base.stage}
        for stage in stages:
            users[stage] = users.get(stage, 0) + 1
    return users


def amortised_flops(run: RunRecord, network: str, shared: Mapping[str, int]) -> float | None:
    """Return the training FLOPs of a network with those of its ancestors, each divided by the groups that build on it.

    Parameters
    ----------
    shared
        How many groups those are, by stage.
    """
    entry = run.trained[network]
    return _amortised(entry, [entry] if network in ("large", "sparse") else _ancestors(run, network), shared)


def shared_by_detectors(groups: Iterable[Sequence[RunRecord]]) -> dict[str, int]:
    """Return how many groups of runs have detectors that build on each network, or are one detector, by its stage."""
    users: dict[str, int] = {}
    for runs in groups:
        bases = (base for run in runs for entry in run.transfer for base in _detector_bases(run, entry))
        for stage in {base.stage for base in bases if base.stage}:
            users[stage] = users.get(stage, 0) + 1
    return users


def amortised_detector(run: RunRecord, entry: str, shared: Mapping[str, int]) -> float | None:
    """Return the training FLOPs of a detector as `amortised_flops` does; `shared` is of `shared_by_detectors`."""
    return _amortised(run.transfer[entry], _detector_bases(run, entry), shared)


def _amortised(entry: TrainingRecord, bases: Sequence[TrainingRecord], shared: Mapping[str, int]) -> float | None:
    if entry.train_flops_total is None:
        return None
    saved = 0.0
    for base in bases:
        if base.train_flops is None:
            return None
        saved += base.train_flops * (1 - 1 / max(1, shared.get(base.stage or "", 1)))
    return entry.train_flops_total - saved


def _detector_bases(run: RunRecord, entry: str) -> list[TrainingRecord]:
    """Return the trainings that a detector builds on; that of the unpruned network, which rows share, among its own."""
    if entry in ("unpruned", "prune_d"):
        found: list[TrainingRecord | None] = [run.transfer.get("unpruned"), run.large]
        found += [base for base in _pruned_networks(run) if entry == "prune_d" and base is not run.large]
        return [base for base in found if base is not None]
    arm = "finetune" if entry == "prune_c" else entry
    return [run.arms[arm], *_ancestors(run, arm)] if arm in run.arms else []


def arm_notation(network: str, runs: Sequence[RunRecord]) -> str:
    """Return ``S_N``, ``T_N`` or ``P_K-R_N`` for an arm of the pruned network, with mean epochs; else nothing.

    In rounds, the parent's epochs are those of all trainings before the last pruning.
    """
    arm = known_arm(network)
    done = [run for run in runs if (entry := run.arms.get(network)) is not None and entry.finished]
    if arm is None or arm.network != "pruned" or not done:
        return ""
    own = _mean_epochs([run.arms[network].epochs for run in done])
    if arm.weights != "inherited":
        return f"{'S' if arm.weights == 'fresh' else 'T'}_{own}" if own else ""
    parent = _mean_epochs([_epochs_before(run) for run in done])
    return f"P_{parent}-R_{own}" if own and parent else ""


def _ancestors(run: RunRecord, network: str) -> list[TrainedRecord]:
    """Return the trained networks that an arm builds on: those that were pruned, and its teacher."""
    arm = known_arm(network)
    if arm is None:
        return []
    bases = _pruned_networks(run) if arm.weights != "fresh" else []
    if arm.weights in ("initial", "early"):
        # What weights are rewound to is part of the unpruned network's training, where that is an ancestor.
        start = [run.early] if run.early is not None and arm.weights == "early" else []
        # A ticket has its mask from what was pruned, unless that is known, or found, without training.
        choices: list[list[TrainedRecord]] = [bases, start, []]
        bases = next(choice for choice in choices if _includes(run.arms[network], choice))
    if arm.taught and run.large is not None and run.large not in bases:
        bases.append(run.large)
    return bases


def _pruned_networks(run: RunRecord) -> list[TrainedRecord]:
    """Return the network that was pruned, and those that were trained between rounds."""
    base = run.sparse or run.large
    between = [
        TrainedRecord(epochs=each.epochs, train_flops=each.train_flops, stage=each.trained_stage)
        for each in run.rounds
        if each.trained_stage
    ]
    return [base, *between] if base is not None else between


def _includes(entry: TrainedRecord, bases: Sequence[TrainedRecord]) -> bool:
    """Tell whether a training's cost has room for those of `bases`."""
    # Totals are exact, but those of other versions may be rounded.
    before = (entry.flops_before or 0) * (1 + 1e-9)
    return sum(base.train_flops or 0 for base in bases) <= before


def _epochs_before(run: RunRecord) -> int | None:
    bases = _pruned_networks(run)
    epochs = [base.epochs for base in bases if base.epochs]
    return sum(epochs) if epochs and len(epochs) == len(bases) else None


def _mean_epochs(epochs: Sequence[int | None]) -> str:
    known = [each for each in epochs if each]
    return f"{np.mean(known):.4g}" if known and len(known) == len(epochs) else ""
