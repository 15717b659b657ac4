"""What the training loop asks of batches, wherever their images are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self

import torch

from rethink_prune.data.shard import Shard


class AnyTrainBatches(Protocol):
    """Shuffled, augmented batches: :class:`~rethink_prune.data.batches.TrainBatches` and the like.

    Attributes
    ----------
    images_per_epoch : int
        Images an epoch really uses, of all processes together.
    steps_per_epoch : int
        Batches of an epoch.
    """

    images_per_epoch: int
    steps_per_epoch: int

    def size(self, step: int) -> int:
        """Return how many images a batch has."""

    def part(self, shard: Shard) -> Self:
        """Return the same batches, of which one process takes its part."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (float32, B x C x H x W, normalised) and labels (int64, B) from a step on."""


class AnyEvalBatches(Protocol):
    """Every image once, unchanged: :class:`~rethink_prune.data.batches.EvalBatches` and the like."""

    def __len__(self) -> int:
        """Return the number of images, of all processes together."""

    def part(self, shard: Shard) -> Self:
        """Return the images of one process; those of all processes make up the whole."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (float32, B x C x H x W, normalised) and labels (int64, B)."""
