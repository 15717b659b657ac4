"""Average precision of detections, as the PASCAL VOC challenge of 2007 counts it, and COCO's where it is installed.

References
----------
M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010; the rules are those of its program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rethink_prune.errors import UserError

Boxes = Mapping[str, torch.Tensor]
_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]
_COCO_FIGURES = ("map", "map_50", "map_75")


def voc_map(
    predictions: Sequence[Boxes],
    targets: Sequence[Boxes],
    iou: float = 0.5,
    points: int | None = 11,
    inclusive: bool = True,
) -> dict[str, Any]:
    """Return the average precision of every class, and their mean, in percent.

    Predictions of a class are taken by falling score over all pictures; of equal scores, the first comes first. Each is
    compared with the object of its class in its picture that it overlaps most. It is right if the overlap is at least
    `iou` and nothing before it had found the object; it is wrong otherwise. If that object is a difficult one, the
    prediction counts neither way.

    Parameters
    ----------
    predictions : sequence of mapping
        One for each picture: ``boxes`` (N x 4: left, top, right, bottom, in pixels), ``scores`` (N) and ``labels`` (N).
    targets : sequence of mapping
        One for each picture: ``boxes``, ``labels`` and, optionally, ``difficult`` (N, true for difficult objects).
    iou : float
        The least overlap, in (0, 1]: area of the intersection by that of the union.
    points : int or None
        The mean of the precision at so many equally spaced recalls from 0 to 1; None for the area under the curve. In
        both, the precision at a recall is the greatest at that recall or above it.
    inclusive : bool
        Whether boxes name their first and last pixel, as VOC's files do: a box from 3 to 5 is 3 pixels wide. False for
        edges: from 3 to 5 are 2 pixels. :class:`~rethink_prune.detection.pictures.Objects` has edges.

    Returns
    -------
    dict
        ``map`` (float, percent) and ``ap`` (percent by label). A class without any object that is not difficult has no
        average precision, and is left out of both.

    Raises
    ------
    UserError
        The lists differ in length, a tensor is missing or has a wrong shape, a number is not finite, a box ends before
        it begins, there is no object that is not difficult, or an option is out of range.

    Notes
    -----
    An overlap of exactly `iou` is enough, as in VOC's program; some later ones ask for more. Recalls are compared as
    fractions of whole numbers: 3 objects of 10 reach a recall of 0.3, whatever the rounding.

    Examples
    --------
    Two objects. The best prediction finds the first, the next finds nothing, the last finds the second. The precision
    is 1 up to a recall of 1/2 (6 of the 11 points), and 2/3 above it (5 points).

    >>> objects = torch.tensor([[1.0, 1, 10, 10], [21, 21, 30, 30]])
    >>> found = torch.tensor([[1.0, 1, 10, 10], [41, 41, 50, 50], [21, 21, 30, 29]])
    >>> labels = torch.ones(3, dtype=torch.int64)
    >>> predictions = [{"boxes": found, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": labels}]
    >>> result = voc_map(predictions, [{"boxes": objects, "labels": labels[:2]}])
    >>> round(result["map"], 3) == round(100 * (6 * 1 + 5 * 2 / 3) / 11, 3)
    True
    """
    if not 0 < iou <= 1:
        raise UserError(f"iou={iou}: must be in (0, 1]")
    if points is not None and points < 2:
        raise UserError(f"points={points}: must be 2 or more, or None for the area under the curve")
    if len(predictions) != len(targets):
        raise UserError(f"{len(predictions)} predictions for {len(targets)} targets: one of each for every picture")
    found, objects = _join_pictures(predictions, "predictions"), _join_pictures(targets, "targets")
    if objects.difficult.all():
        only = "only difficult ones" if len(objects.labels) else "no boxes"
        raise UserError(f"targets: {only}, so there is nothing to find")
    right, counted = _judge_predictions(found, objects, iou, inclusive)
    labels, totals = np.unique(objects.labels[~objects.difficult], return_counts=True)
    ap = {}
    for label, total in zip(labels.tolist(), totals.tolist(), strict=True):
        outcomes = right[counted & (found.labels == label)]
        ap[label] = 100 * _average_curve(outcomes, total, points)
    return {"map": sum(ap.values()) / len(ap), "ap": ap}


def coco_map(predictions: Sequence[Boxes], targets: Sequence[Boxes]) -> dict[str, float] | None:
    """Return COCO's average precision in percent, by torchmetrics and faster-coco-eval; None where they are missing.

    Parameters
    ----------
    predictions, targets : sequence of mapping
        As for :func:`voc_map`, with edges. Difficult objects are COCO's crowds: what lies in one counts neither way.

    Returns
    -------
    dict or None
        ``map`` (mean over overlaps from 0.5 to 0.95), ``map_50`` and ``map_75``. Only the 100 best predictions of a
        picture count. ``pip install "rethink-prune[detection]"`` installs what is needed.

    Examples
    --------
    >>> objects = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1])}
    >>> coco_map([{**objects, "scores": torch.tensor([0.5])}], [objects]) in (
    ...     None,
    ...     {"map": 100.0, "map_50": 100.0, "map_75": 100.0},
    ... )
    True
    """
    try:
        import faster_coco_eval  # noqa: F401  torchmetrics imports it late, with a message of its own
        from torchmetrics.detection import MeanAveragePrecision  # takes seconds to import
    except ImportError:
        return None
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    crowds = [
        {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "iscrowd": target.get("difficult", torch.zeros(len(target["labels"]))).long(),
        }
        for target in targets
    ]
    metric.update([dict(prediction) for prediction in predictions], crowds)
    figures = metric.compute()
    return {name: 100 * float(figures[name]) for name in _COCO_FIGURES}


@dataclass(frozen=True)
class _Joined:
    """The boxes of all pictures; predictions come by falling score."""

    pictures: _Integers
    boxes: _Floats
    labels: _Integers
    difficult: npt.NDArray[np.bool_]


def _join_pictures(pictures: Sequence[Boxes], name: str) -> _Joined:
    """Check the boxes of every picture and join them; where they have scores, sort them by score."""
    scored = name == "predictions"
    rows = [_read_picture(boxes, f"{name}[{index}]", scored) for index, boxes in enumerate(pictures)]
    counts = [len(labels) for _, labels, _ in rows]
    indices = np.repeat(np.arange(len(rows)), counts)
    boxes = np.concatenate([np.empty((0, 4)), *(boxes for boxes, _, _ in rows)])
    labels = np.concatenate([np.empty(0, np.int64), *(labels for _, labels, _ in rows)])
    # Scores of predictions, flags of targets.
    values = np.concatenate([np.empty(0), *(values for _, _, values in rows)])
    if not scored:
        return _Joined(indices, boxes, labels, values.astype(bool))
    order = np.argsort(-values, kind="stable")
    return _Joined(indices[order], boxes[order], labels[order], np.zeros(len(order), bool))


def _read_picture(picture: Boxes, where: str, scored: bool) -> tuple[_Floats, _Integers, _Floats]:
    """Return the boxes of one picture, their labels, and their scores or whether they are difficult."""
    if missing := [key for key in ("boxes", "labels", "scores")[: 2 + scored] if key not in picture]:
        raise UserError(f"{where}: has no {missing[0]}")
    boxes, labels = _read_numbers(picture["boxes"]), _read_numbers(picture["labels"])
    extra = "scores" if scored else "difficult"
    values = _read_numbers(picture[extra]) if extra in picture else np.zeros(len(labels))
    if boxes.shape == (0,):  # torch.tensor([])
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"{where}.boxes: has the shape {_show_shape(boxes)}, must have N x 4")
    for key, array in (("labels", labels), (extra, values)):
        if array.shape != boxes.shape[:1]:
            raise UserError(f"{where}.{key}: has the shape {_show_shape(array)}, must have {len(boxes)}, one a box")
    for key, array in (("boxes", boxes), (extra, values)):
        if not np.isfinite(array).all():
            raise UserError(f"{where}.{key}: holds a number that is not finite")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise UserError(f"{where}.boxes: must be left, top, right, bottom; one ends before it begins")
    return boxes, labels.astype(np.int64), values


def _read_numbers(tensor: torch.Tensor) -> _Floats:
    return torch.as_tensor(tensor).detach().cpu().to(torch.float64).numpy()


def _show_shape(array: _Floats) -> str:
    return " x ".join(map(str, array.shape)) or "of a single number"


def _judge_predictions(
    found: _Joined, objects: _Joined, iou: float, inclusive: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which predictions are right, and which count at all."""
    best = _find_largest_overlap(found, objects, iou, inclusive)
    hits = best >= 0
    difficult = np.zeros(len(best), bool)
    difficult[hits] = objects.difficult[best[hits]]
    candidates = np.flatnonzero(hits & ~difficult)
    # Predictions come by falling score: the first that names an object is the one that finds it.
    _, first = np.unique(best[candidates], return_index=True)
    right = np.zeros(len(best), bool)
    right[candidates[first]] = True
    return right, ~difficult


def _find_largest_overlap(found: _Joined, objects: _Joined, iou: float, inclusive: bool) -> _Integers:
    """Return for every prediction the object that it overlaps most, or -1 if it overlaps none by at least `iou`.

    Only objects of the same class in the same picture are looked at; of equal overlaps, the first one wins.
    """
    # One number for each class in each picture.
    names, index = np.unique(np.concatenate([found.labels, objects.labels]), return_inverse=True)
    group = np.concatenate([found.pictures, objects.pictures]) * len(names) + index
    mine, theirs = group[: len(found.labels)], group[len(found.labels) :]
    order = np.argsort(theirs, kind="stable")
    start, stop = (np.searchsorted(theirs[order], mine, side=side) for side in ("left", "right"))
    counts = stop - start
    best = np.full(len(mine), -1, np.int64)
    having = np.flatnonzero(counts)
    if not len(having):
        return best
    # All pairs in one long list; those of one prediction stand together, from `offsets` on.
    counts, start = counts[having], start[having]
    offsets = np.cumsum(counts) - counts
    position = np.arange(counts.sum()) - np.repeat(offsets, counts)
    candidates = order[np.repeat(start, counts) + position]
    overlaps = _overlap_of_pairs(found.boxes[np.repeat(having, counts)], objects.boxes[candidates], inclusive)
    largest = np.maximum.reduceat(overlaps, offsets)
    is_largest = overlaps == np.repeat(largest, counts)
    first = np.minimum.reduceat(np.where(is_largest, position, len(order)), offsets)
    enough = largest >= iou
    best[having[enough]] = candidates[offsets + first][enough]
    return best


def _overlap_of_pairs(a: _Floats, b: _Floats, inclusive: bool) -> _Floats:
    """Return the intersection by the union of boxes of two lists of the same length."""

    def area(first: _Floats, last: _Floats) -> _Floats:
        return np.clip(last - first + inclusive, 0, None).prod(axis=1)

    intersection = area(np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:]))
    union = area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - intersection
    return intersection / np.where(union > 0, union, 1)


def _average_curve(right: npt.NDArray[np.bool_], total: int, points: int | None) -> float:
    """Return the average precision in [0, 1] of predictions by falling score for `total` objects."""
    if not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    # The greatest precision at that recall or above it.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points is None:
        # Recall grows by one object at every hit, and not in between.
        return float(envelope[right].sum() / total)
    # The first prediction with a recall of at least k / (points - 1), in whole numbers; none: a precision of 0.
    reached = np.searchsorted(hits * (points - 1), np.arange(points) * total)
    return float(np.append(envelope, 0.0)[reached].mean())
