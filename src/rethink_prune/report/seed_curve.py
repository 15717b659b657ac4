"""Curves of a training over seeds: an arm's, or a detector's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rethink_prune.report.records import TrainingRecord
from rethink_prune.report.remaining import mean_if_known


@dataclass(frozen=True)
class SeedCurve:
    """A result during training: the mean over seeds, and the lowest and highest seed.

    Seeds that trained for different numbers of epochs are matched by the share of their training that is done; the
    positions are means too. `flops` counts the ancestors' training, and is None where that is not known.
    """

    epoch: tuple[float, ...]
    flops: tuple[float, ...] | None
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curve_over_seeds(entries: Sequence[TrainingRecord]) -> SeedCurve | None:
    """Return the curve of a training over its seeds; None unless every seed's is known."""
    curves = [entry.curve for entry in entries if entry.curve]
    # A band that leaves some seeds out would look narrower than it is.
    if not curves or len(curves) < len(entries):
        return None
    # The share of training done after each epoch; nothing is recorded before the first one, at share 0.
    share = np.linspace(0, 1, max(map(len, curves)) + 1)[1:]
    results = np.array([np.interp(share * len(curve), np.arange(1, len(curve) + 1), curve) for curve in curves])
    epochs = share * np.mean([len(curve) for curve in curves])
    own, before = (
        mean_if_known([getattr(entry, cost) for entry in entries]) for cost in ("train_flops", "flops_before")
    )
    # Ancestors are trained first: by FLOPs, a curve starts where theirs end.
    flops = tuple((before + own * share).tolist()) if own is not None and before is not None else None
    mean, low, high = (
        tuple(line.tolist()) for line in (results.mean(axis=0), results.min(axis=0), results.max(axis=0))
    )
    return SeedCurve(tuple(epochs.tolist()), flops, mean, low, high)
