"""Pictures for a detector: what an epoch holds, mirror images, difficult objects, and how processes share them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from rethink_prune.data.batches import UNSHARED, Shard
from rethink_prune.detection.batches import PictureBatch, TestPictures, TrainPictures
from rethink_prune.detection.pictures import Objects

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Marked:
    """Seven pictures of different sizes; the first pixel says which it is. Each second object is difficult."""

    classes: tuple[str, ...] = ("a", "b")
    fingerprint: str = ""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(4 + index, 10 + index) for index in range(7)]

    def __len__(self) -> int:
        return 7

    def picture(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(100, 200, (3, *self.sizes[index]), generator=generator, dtype=torch.uint8)
        picture[:, 0, 0] = index
        return picture

    def objects(self, index: int) -> Objects:
        boxes = torch.tensor([[0.0, 0, 3, 2], [1, 1, 10, 4], [2, 0, 7, 3]])
        return Objects(boxes, torch.tensor([1, 2, 1 + index % 2]), torch.tensor([False, True, False]))


DATA = Marked()


def pictures(flip: bool = False, batch_size: int = 3, seed: int = 0, shard: Shard = UNSHARED) -> TrainPictures:
    return TrainPictures(DATA, batch_size, flip, seed, CPU, shard)


def which(picture: torch.Tensor) -> tuple[int, bool]:
    """Return which picture it is, and whether it is its mirror image."""
    left, right = (int((picture[0, 0, column] * 255).round()) for column in (0, -1))
    return (left, False) if left < 100 else (right, True)


def order(batches: TrainPictures, epoch: int = 0, start: int = 0) -> list[list[tuple[int, bool]]]:
    return [[which(picture) for picture in images] for images, _ in batches.epoch(epoch, start)]


def flat(batches: list[list[tuple[int, bool]]]) -> list[tuple[int, bool]]:
    return [each for batch in batches for each in batch]


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_has_every_picture_once_and_its_mirror_image(flip: bool) -> None:
    batches = pictures(flip)
    found = order(batches)
    assert sorted(flat(found)) == sorted((index, mirrored) for index in range(7) for mirrored in {False, flip})
    assert [len(batch) for batch in found] == ([3, 3, 3, 3, 2] if flip else [3, 3, 1])
    assert [len(batch) for batch in found] == [batches.size(step) for step in range(batches.steps_per_epoch)]
    assert batches.images_per_epoch == len(flat(found))


def test_a_mirror_image_has_the_boxes_of_what_it_shows() -> None:
    for images, targets in pictures(flip=True).epoch(0):
        for picture, target in zip(images, targets, strict=True):
            index, mirrored = which(picture)
            original, objects = DATA.picture(index).float() / 255, DATA.objects(index)
            assert torch.equal(picture.flip(2) if mirrored else picture, original)
            for (left, top, right, bottom), (x, y, to_x, to_y) in zip(
                target["boxes"].int().tolist(), objects.boxes[~objects.difficult].int().tolist(), strict=True
            ):
                shown, there = picture[:, top:bottom, left:right], original[:, y:to_y, x:to_x]
                assert torch.equal(shown.flip(2) if mirrored else shown, there)
                assert (left == x) is not mirrored
            assert target["boxes"].dtype == torch.float32


def test_difficult_objects_are_tested_and_not_trained_on() -> None:
    def difficult(batches: list[PictureBatch]) -> list[list[bool]]:
        return [target["difficult"].tolist() for _, targets in batches for target in targets]

    assert difficult([*pictures().epoch(0)]) == [[False, False]] * 7
    assert difficult([*TestPictures(DATA, 2, CPU)]) == [[False, True, False]] * 7
    for _, targets in pictures().epoch(0):
        assert all(len(target["boxes"]) == len(target["labels"]) == 2 for target in targets)


def test_the_order_is_that_of_seed_and_epoch() -> None:
    first = order(pictures(), 0)
    assert order(pictures(), 0) == first
    assert flat(order(pictures(batch_size=2), 0)) == flat(first)
    others = [order(pictures(), 1), order(pictures(seed=1), 0), order(pictures(seed=1), 1)]
    assert all(other != first for other in others)
    assert others[0] != others[1]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_an_epoch_goes_on_from_a_step(start: int) -> None:
    assert order(pictures(flip=True), 4, start) == order(pictures(flip=True), 4)[start:]


@pytest.mark.parametrize("batch_size", [4, 6])
def test_two_processes_share_every_batch(batch_size: int) -> None:
    whole = pictures(flip=True, batch_size=batch_size)
    shards = [Shard(rank, 2) for rank in range(2)]
    parts = [order(whole.part(shard), 2) for shard in shards]
    for batch, *own in zip(order(whole, 2), *parts, strict=True):
        if len(batch) < 4:  # too small to be shared: the last one, which each computes
            assert own == [batch, batch]
        else:
            assert flat(own) == batch
            assert all(own)
    tests = TestPictures(DATA, 2, CPU)
    halves = [which(picture)[0] for shard in shards for images, _ in tests.part(shard) for picture in images]
    assert halves == list(range(7))
    assert len(tests.part(shards[0])) == 7
    assert [len(images) for images, _ in replace(tests, batch_size=3)] == [3, 3, 1]
