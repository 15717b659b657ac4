"""Pictures for a detector: shuffled and mirrored for training, in order for a test."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rethink_prune.data.batches import UNSHARED, Shard
from rethink_prune.detection.pictures import Objects, Pictures
from rethink_prune.seeds import derive_generator

# In torchvision's form.
DetectionTarget = dict[str, Tensor]
PictureBatch = tuple[list[Tensor], list[DetectionTarget]]


@dataclass(frozen=True)
class TrainPictures:
    """Shuffled batches of pictures, and with `flip` also of their mirror images.

    Difficult objects are left out. A partial last batch is kept.

    Attributes
    ----------
    pictures : Pictures
    batch_size : int
        Pictures in a batch, of all processes together.
    seed : int
        With the epoch, it decides the order.
    shard : Shard
        Which part of every batch this process takes.
    """

    pictures: Pictures
    batch_size: int
    flip: bool
    seed: int
    device: torch.device
    shard: Shard = UNSHARED

    @property
    def images_per_epoch(self) -> int:
        """Pictures of an epoch, mirror images included."""
        return len(self.pictures) * (2 if self.flip else 1)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.images_per_epoch / self.batch_size)

    def size(self, step: int) -> int:
        """Return how many pictures a batch has, of all processes together."""
        return min(self.batch_size, self.images_per_epoch - step * self.batch_size)

    def part(self, shard: Shard) -> Self:
        """Return the same batches, of which one process takes its part."""
        return replace(self, shard=shard)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[PictureBatch]:
        """Yield the batches of an epoch from a step on: pictures 3 x H x W in [0, 1], and their objects."""
        order = torch.randperm(self.images_per_epoch, generator=derive_generator(self.seed, "pictures", epoch)).tolist()
        for step in range(start_step, self.steps_per_epoch):
            start = step * self.batch_size
            places = order[self.shard.of_batch(start, start + self.size(step))]
            yield _batch([self._example(place) for place in places], self.device)

    def _example(self, place: int) -> tuple[Tensor, Objects]:
        index = place % len(self.pictures)
        picture, objects = self.pictures.picture(index), self.pictures.objects(index)
        there = ~objects.difficult
        boxes, labels, difficult = objects.boxes[there], objects.labels[there], objects.difficult[there]
        if place >= len(self.pictures):
            picture = picture.flip(2)
            # Left and right change places.
            boxes = torch.stack(
                [picture.shape[2] - boxes[:, 2], boxes[:, 1], picture.shape[2] - boxes[:, 0], boxes[:, 3]], 1
            )
        return picture, Objects(boxes, labels, difficult)


@dataclass(frozen=True)
class TestPictures:
    """Every picture once, in order."""

    __test__ = False

    pictures: Pictures
    batch_size: int
    device: torch.device
    shard: Shard = UNSHARED

    def __len__(self) -> int:
        """Return the number of pictures, of all processes together."""
        return len(self.pictures)

    def part(self, shard: Shard) -> Self:
        """Return the pictures of one process; those of all processes make up the whole."""
        return replace(self, shard=shard)

    def __iter__(self) -> Iterator[PictureBatch]:
        own = self.shard.of(0, len(self))
        for start in range(own.start, own.stop, self.batch_size):
            stop = min(start + self.batch_size, own.stop)
            found = [(self.pictures.picture(index), self.pictures.objects(index)) for index in range(start, stop)]
            yield _batch(found, self.device)


def _batch(examples: list[tuple[Tensor, Objects]], device: torch.device) -> PictureBatch:
    pictures = [picture.to(device, non_blocking=True).float().div_(255) for picture, _ in examples]
    return pictures, [{name: t.to(device) for name, t in vars(objects).items()} for _, objects in examples]
