"""One arm of a study over its seeds: accuracy, cost, and the curve of its training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rethink_prune.report.records import RunRecord, TrainedRecord
from rethink_prune.report.statistics import SeedStatistics, describe_seeds


@dataclass(frozen=True)
class SeedCurve:
    """Top-1 during training: the mean over seeds, and the lowest and highest seed.

    Seeds that trained for different numbers of epochs are matched by the share of their training that is done; the
    positions are means too. `flops` counts the ancestors' training, and is None where that is not known.
    """

    epoch: tuple[float, ...]
    flops: tuple[float, ...] | None
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class ArmOverSeeds:
    """An arm over the seeds of a row; so are the unpruned network and the pruned one before any retraining.

    Attributes
    ----------
    top1, top1_best
        Percent after the last epoch, and of the best epoch on the test images.
    epochs, params, macs, train_flops, flops_before
        Means over seeds; `flops_before` is what its ancestors' training took.
    curve
        Where every seed's is known.
    """

    arm: str
    top1: SeedStatistics | None
    top1_best: SeedStatistics | None = None
    epochs: float | None = None
    params: float | None = None
    macs: float | None = None
    train_flops: float | None = None
    flops_before: float | None = None
    curve: SeedCurve | None = None

    @property
    def flops_total(self) -> float | None:
        """Training FLOPs with those of its ancestors."""
        if self.train_flops is None or self.flops_before is None:
            return None
        return self.train_flops + self.flops_before


def arm_over_seeds(arm: str, runs: Sequence[RunRecord]) -> ArmOverSeeds:
    """Summarise an arm over the runs that finished it."""
    done = [entry for run in runs if (entry := run.trained.get(arm)) is not None and entry.finished]
    best = [entry.top1_best for entry in done if entry.top1_best is not None]
    costs = ("epochs", "params", "macs", "train_flops", "flops_before")
    means = {cost: _mean_if_known([getattr(entry, cost) for entry in done]) for cost in costs}
    return ArmOverSeeds(
        arm=arm,
        top1=describe_seeds([entry.top1 for entry in done if entry.top1 is not None]),
        # A mean over some of the seeds would not belong to the other numbers of the arm.
        top1_best=describe_seeds(best) if len(best) == len(done) else None,
        curve=_curve_over_seeds(done, means["train_flops"], means["flops_before"]),
        **means,
    )


def _curve_over_seeds(entries: Sequence[TrainedRecord], own: float | None, before: float | None) -> SeedCurve | None:
    """Return the curve; `own` and `before` are the mean training FLOPs of the arm and of its ancestors."""
    curves = [entry.curve for entry in entries if entry.curve]
    # A band that leaves some seeds out would look narrower than it is.
    if not curves or len(curves) < len(entries):
        return None
    # The share of training done after each epoch; nothing is recorded before the first one, at share 0.
    share = np.linspace(0, 1, max(map(len, curves)) + 1)[1:]
    top1 = np.array([np.interp(share * len(curve), np.arange(1, len(curve) + 1), curve) for curve in curves])
    epochs = share * np.mean([len(curve) for curve in curves])
    # Ancestors are trained first: by FLOPs, a curve starts where theirs end.
    flops = tuple((before + own * share).tolist()) if own is not None and before is not None else None
    mean, low, high = (tuple(line.tolist()) for line in (top1.mean(axis=0), top1.min(axis=0), top1.max(axis=0)))
    return SeedCurve(tuple(epochs.tolist()), flops, mean, low, high)


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if any value is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
