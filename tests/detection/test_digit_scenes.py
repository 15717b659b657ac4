"""Scenes of digits: where the digits are, that boxes fit them, and what scenes depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rethink_prune.config import TransferConfig
from rethink_prune.detection import DetectionData, load_detection


def load(**options: Any) -> DetectionData:
    return load_detection(TransferConfig(name="digit_scenes", epochs=1, lr=0.01, **options), Path("unused"))


@pytest.fixture(scope="module")
def data() -> DetectionData:
    return load(scenes=60, test_scenes=30)


def test_scenes_hold_two_to_five_digits_that_overlap_little(data: DetectionData) -> None:
    seen, counts = set(), set()
    for index in range(len(data.train)):
        picture, objects = data.train.picture(index), data.train.objects(index)
        assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (3, *data.train.sizes[index]))
        assert objects.boxes.dtype == torch.float32
        counts.add(len(objects))
        seen |= set(objects.labels.tolist())
        first, last = objects.boxes[:, :2], objects.boxes[:, 2:]
        assert first.min() >= 0
        assert last.max() <= 96
        heights = last[:, 1] - first[:, 1]
        assert heights.min() >= 11  # a digit of 14 with a faint row
        assert heights.max() <= 40
        shared = (torch.minimum(last[:, None], last) - torch.maximum(first[:, None], first)).clamp(min=0).prod(2)
        areas = (last - first).prod(1)
        shared.fill_diagonal_(0)
        assert (shared <= 0.1 * torch.minimum(areas[:, None], areas)).all()
    assert seen == set(range(1, 11))
    assert counts == {2, 3, 4, 5}
    assert data.train.classes == data.test.classes == tuple("0123456789")


def test_boxes_are_tight_around_the_ink(data: DetectionData) -> None:
    """Every side of a box touches bright pixels; outside of all boxes there is the dark canvas and faint edges."""
    for index in range(len(data.test)):
        grey, boxes = data.test.picture(index)[0], data.test.objects(index).boxes.int().tolist()
        outside = torch.ones_like(grey, dtype=torch.bool)
        for left, top, right, bottom in boxes:
            part = grey[top:bottom, left:right]
            assert min(part[0].max(), part[-1].max(), part[:, 0].max(), part[:, -1].max()) >= 0.6 * 64 - 1
            outside[top:bottom, left:right] = False
        assert grey[outside].max() < 64


def test_a_scene_depends_on_nothing_but_its_side_its_number_and_its_size(data: DetectionData) -> None:
    fewer = load(scenes=5, test_scenes=5)
    for index in range(5):
        assert torch.equal(fewer.train.picture(index), data.train.picture(index))
        assert torch.equal(fewer.test.objects(index).boxes, data.test.objects(index).boxes)
    assert not torch.equal(fewer.train.picture(0), fewer.test.picture(0))
    assert load(scenes=5, test_scenes=5).train.fingerprint == fewer.train.fingerprint
    assert load(scenes=5, test_scenes=5, picture_size=128).train.fingerprint != fewer.train.fingerprint
    assert fewer.train.fingerprint != data.train.fingerprint


def test_changing_a_picture_leaves_the_scene_as_it_is(data: DetectionData) -> None:
    before = data.train.picture(0)
    data.train.picture(0).zero_()
    assert torch.equal(data.train.picture(0), before)


def test_options_of_files_are_refused() -> None:
    for option, value in (("root", "/photos"), ("train_limit", 5), ("test_limit", 5)):
        with pytest.raises(ValidationError, match=f"{option}: of no use with digit_scenes"):
            TransferConfig(name="digit_scenes", epochs=1, lr=0.01, **{option: value})
    with pytest.raises(ValidationError, match=r"Input should be 'voc' or 'digit_scenes'"):
        TransferConfig(name="coco", epochs=1, lr=0.01)
