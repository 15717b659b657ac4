"""What a trained network costs where several rows build on one large network, and how its training is written down."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rethink_prune.report.records import RunRecord, TrainedRecord
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
    if entry.train_flops_total is None:
        return None
    bases = [entry] if network in ("large", "sparse") else _ancestors(run, network)
    saved = 0.0
    for base in bases:
        if base.train_flops is None:
            return None
        saved += base.train_flops * (1 - 1 / max(1, shared.get(base.stage or "", 1)))
    return entry.train_flops_total - saved


def arm_notation(network: str, runs: Sequence[RunRecord]) -> str:
    """Return ``S_N`` or ``P_K-R_N`` for an arm of the pruned network, with mean epochs over its runs; else nothing."""
    arm = known_arm(network)
    done = [run for run in runs if (entry := run.arms.get(network)) is not None and entry.finished]
    if arm is None or arm.network != "pruned" or not done:
        return ""
    own = _mean_epochs([run.arms[network] for run in done])
    if arm.weights == "fresh":
        return f"S_{own}" if own else ""
    parent = _mean_epochs([run.sparse or run.large for run in done])
    return f"P_{parent}-R_{own}" if own and parent else ""


def _ancestors(run: RunRecord, network: str) -> list[TrainedRecord]:
    """Return the trained networks that an arm builds on: the one that was pruned, and its teacher."""
    arm = known_arm(network)
    bases = [run.sparse or run.large] if arm is not None and arm.weights == "inherited" else []
    if arm is not None and arm.taught and run.large not in bases:
        bases.append(run.large)
    return [base for base in bases if base is not None]


def _mean_epochs(entries: Sequence[TrainedRecord | None]) -> str:
    epochs = [entry.epochs for entry in entries if entry is not None and entry.epochs]
    return f"{np.mean(epochs):.4g}" if epochs and len(epochs) == len(entries) else ""
