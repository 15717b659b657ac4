"""Average precision: VOC's rules, checked against a second implementation that follows its program line by line."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from typing import Any

import pytest
import torch

from rethink_prune.detection import coco_map, voc_map
from rethink_prune.errors import UserError

Picture = dict[str, torch.Tensor]


def slow_map(
    predictions: list[Picture], targets: list[Picture], iou: float, points: int | None, inclusive: bool
) -> dict[int, float]:
    """Count as the VOC program's `VOCevaldet` does: one class, one prediction, one object at a time."""
    extra = 1 if inclusive else 0
    found: dict[int, float] = {}
    for label in sorted({int(c) for target in targets for c in target["labels"]}):
        lines = []
        for image, prediction in enumerate(predictions):
            for box, score, c in zip(*(prediction[k].tolist() for k in ("boxes", "scores", "labels")), strict=True):
                if c == label:
                    lines.append((score, image, box))
        lines.sort(key=lambda line: -line[0])  # Python's sort is stable
        total, objects = 0, []
        for target in targets:
            difficult = target.get("difficult", torch.zeros(len(target["labels"]))).tolist()
            objects.append(
                [
                    {"box": box, "difficult": bool(d), "taken": False}
                    for box, c, d in zip(target["boxes"].tolist(), target["labels"].tolist(), difficult, strict=True)
                    if c == label
                ]
            )
            total += sum(not thing["difficult"] for thing in objects[-1])
        if not total:
            continue
        outcomes = []
        for _, image, box in lines:
            best, match = -1.0, None
            for thing in objects[image]:
                other = thing["box"]
                width = min(box[2], other[2]) - max(box[0], other[0]) + extra
                height = min(box[3], other[3]) - max(box[1], other[1]) + extra
                if width > 0 and height > 0:
                    areas = sum((b[2] - b[0] + extra) * (b[3] - b[1] + extra) for b in (box, other))
                    if width * height / (areas - width * height) > best:
                        best, match = width * height / (areas - width * height), thing
            if match is None or best < iou:
                outcomes.append(False)
            elif not match["difficult"]:
                outcomes.append(not match["taken"])
                match["taken"] = True
        curve, right = [], 0
        for rank, outcome in enumerate(outcomes, 1):
            right += outcome
            curve.append((Fraction(right, total), right / rank))
        if points is None:
            area, last = 0.0, Fraction(0)
            for position, (recall, _) in enumerate(curve):
                area += float(recall - last) * max(p for _, p in curve[position:])
                last = recall
            found[label] = 100 * area
        else:
            levels = [Fraction(k, points - 1) for k in range(points)]
            best_at = [max((p for r, p in curve if r >= level), default=0.0) for level in levels]
            found[label] = 100 * sum(best_at) / points
    return found


def random_picture(generator: torch.Generator, *, scored: bool) -> Picture:
    # Small whole numbers and few scores: equal overlaps, overlaps of exactly one half and equal scores are common.
    count = int(torch.randint(0, 9, (1,), generator=generator))
    first = torch.randint(1, 7, (count, 2), generator=generator)
    size = torch.randint(0, 6, (count, 2), generator=generator)
    picture = {
        "boxes": torch.cat([first, first + size], dim=1).float(),
        "labels": torch.randint(1, 5, (count,), generator=generator),
    }
    if scored:
        picture["scores"] = torch.randint(0, 6, (count,), generator=generator) / 5
    elif torch.rand(1, generator=generator) < 0.7:  # the flag may be absent
        picture["difficult"] = torch.rand(count, generator=generator) < 0.3
    return picture


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("points", [11, 101, None])
def test_vectorised_equals_the_rules_taken_one_by_one(points: int | None, inclusive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    seen_without_objects = 0
    for iou in (0.3, 0.5, 0.5, 1.0) * 10:
        predictions = [random_picture(generator, scored=True) for _ in range(12)]
        targets = [random_picture(generator, scored=False) for _ in range(12)]
        seen_without_objects += any(not len(target["labels"]) for target in targets)
        expected = slow_map(predictions, targets, iou, points, inclusive)
        result = voc_map(predictions, targets, iou, points, inclusive)
        assert result["ap"] == pytest.approx(expected, abs=1e-9)
        assert result["map"] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-9)
    assert seen_without_objects


def picture(*boxes: tuple[float, ...], label: int = 1, **more: Any) -> Picture:
    tensors = {name: torch.tensor(values) for name, values in more.items()}
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), label), **tensors}


def test_edges_measure_as_vocs_pixel_numbers_do() -> None:
    """Pixels a to b have the edges a - 1 and b: nothing changes if `inclusive` says which of the two they are."""
    generator = torch.Generator().manual_seed(1)
    predictions = [random_picture(generator, scored=True) for _ in range(20)]
    targets = [random_picture(generator, scored=False) for _ in range(20)]
    edges = torch.tensor([1.0, 1, 0, 0])
    moved = [[{**p, "boxes": p["boxes"] - edges} for p in side] for side in (predictions, targets)]
    assert voc_map(*moved, inclusive=False) == voc_map(predictions, targets)
    assert voc_map(*moved, inclusive=True) != voc_map(predictions, targets)


def test_second_detection_is_wrong_and_a_difficult_one_counts_neither_way() -> None:
    box, other = (1.0, 1.0, 9.0, 9.0), (20.0, 20.0, 29.0, 29.0)
    twice = picture(box, box, other, scores=[0.9, 0.8, 0.7])
    plain = voc_map([twice], [picture(box, other)], points=None)
    assert plain["map"] == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))
    # The object that was found twice is difficult: both detections vanish, and so does the object.
    easy = voc_map([twice], [picture(box, other, difficult=[True, False])], points=None)
    assert easy["map"] == pytest.approx(100)


def test_three_of_ten_reach_a_recall_of_three_tenths() -> None:
    boxes = [(20.0 * k, 0.0, 20.0 * k + 9, 9.0) for k in range(10)]
    found = picture(*boxes[:3], scores=[0.9, 0.8, 0.7])
    assert voc_map([found], [picture(*boxes)])["map"] == pytest.approx(100 * 4 / 11)


def test_a_class_without_objects_is_left_out_and_one_without_predictions_counts_as_zero() -> None:
    box = (1.0, 1.0, 9.0, 9.0)
    targets = [picture(box), picture(box, label=2), picture(box, label=3, difficult=[True])]
    predictions = [picture(box, scores=[0.9]), picture(), picture(box, label=4, scores=[0.9])]
    predictions[1]["scores"] = torch.tensor([])
    assert voc_map(predictions, targets) == {"map": 50.0, "ap": {1: pytest.approx(100), 2: 0.0}}


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [picture((1.0, 1, 2, 2))], "0 predictions for 1 targets: one of each for every picture"),
        ([], [], "targets: no boxes, so there is nothing to find"),
        (
            [picture((1.0, 1, 2, 2), scores=[1.0])],
            [picture((1.0, 1, 2, 2), difficult=[True])],
            "targets: only difficult ones, so there is nothing to find",
        ),
        ([picture()], [picture()], "predictions[0]: has no scores"),
        (
            [{**picture(), "scores": torch.tensor([0.5])}],
            [picture()],
            "predictions[0].scores: has the shape 1, must have 0, one a box",
        ),
        (
            [picture((1.0, 1, 2, 2), scores=[1.0])],
            [{"boxes": torch.ones(2, 5), "labels": torch.ones(2)}],
            "targets[0].boxes: has the shape 2 x 5, must have N x 4",
        ),
        (
            [picture((1.0, 1, 2, 2), scores=[float("nan")])],
            [picture((1.0, 1, 2, 2))],
            "predictions[0].scores: holds a number that is not finite",
        ),
        (
            [picture((5.0, 5, 2, 2), scores=[1.0])],
            [picture((1.0, 1, 2, 2))],
            "predictions[0].boxes: must be left, top, right, bottom; one ends before it begins",
        ),
    ],
)
def test_bad_input_is_one_clear_line(predictions: list[Picture], targets: list[Picture], message: str) -> None:
    with pytest.raises(UserError) as error:
        voc_map(predictions, targets)
    assert str(error.value) == message


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match=r"^iou=1.5: must be in \(0, 1\]$"):
        voc_map([], [], iou=1.5)
    with pytest.raises(UserError, match=r"^points=1: must be 2 or more, or None"):
        voc_map([], [], points=1)


EXTRA = all(importlib.util.find_spec(name) for name in ("torchmetrics", "faster_coco_eval"))


@pytest.mark.skipif(not EXTRA, reason='needs pip install "rethink-prune[detection]"')
def test_coco_counts_overlaps_and_ignores_difficult_objects() -> None:
    box, rest = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    # An overlap of 0.72: right from 0.5 to 0.7, which is 5 of COCO's 10 thresholds.
    prediction = picture((0.0, 0.0, 10.0, 7.2), rest, scores=[0.9, 0.95])
    figures = coco_map([prediction], [picture(box, rest, difficult=[False, True])])
    assert figures == {"map": pytest.approx(50), "map_50": pytest.approx(100), "map_75": pytest.approx(0)}


@pytest.mark.skipif(EXTRA, reason="the extra is installed")
def test_without_the_extra_there_is_no_coco_figure() -> None:
    assert coco_map([picture((0.0, 0, 9, 9), scores=[0.5])], [picture((0.0, 0, 9, 9))]) is None
