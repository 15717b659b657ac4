"""How an epoch is divided into batches, and a batch among the processes of a distributed training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Self

from rethink_prune.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world` processes that share every batch; the default is the only process.

    Attributes
    ----------
    rank : int
        In [0, world).
    world : int
        Number of processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, start: int, stop: int) -> slice:
        """Return this process's part of the positions ``[start, stop)``; the parts of all processes make up the whole.

        Parts differ by one position at most, and can be empty.

        Examples
        --------
        >>> [Shard(rank, 3).of(0, 8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        count = stop - start
        return slice(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)

    def copies(self, images: int) -> int:
        """Return how many processes train on each image of a batch of so many: one, or all.

        Batch normalisation needs two images, so a batch without two for every process (the last of an epoch) is not
        shared: every process computes the whole of it.
        """
        return 1 if images >= 2 * self.world else self.world

    def of_batch(self, start: int, stop: int) -> slice:
        """Return this process's part of a training batch at the positions ``[start, stop)`` of an epoch."""
        return self.of(start, stop) if self.copies(stop - start) == 1 else slice(start, stop)

    def weight(self, part: int, images: int) -> float:
        """Return what the mean over this process's part of a training batch counts for.

        The mean over all processes of their weighted means is the mean over the batch.

        Parameters
        ----------
        part, images : int
            Images in this process's part, and in the batch.
        """
        return part * self.world / (images * self.copies(images))


class Shared:
    """Images that the processes of a distributed training take parts of; at first, one process takes all."""

    _shard = Shard()

    def part(self, shard: Shard) -> Self:
        """Return the same images, of which one process takes its part; memory and workers are shared."""
        part = copy.copy(self)
        part._shard = shard
        return part


class DividedEpoch(Shared):
    """The positions of an epoch, divided into batches, of which a process takes its part.

    A partial last batch is kept, except for a single image, from which batch normalisation has no variance to take.

    Parameters
    ----------
    images : int
        Training images.
    batch_size : int
        Images per batch, of all processes together.

    Attributes
    ----------
    images_per_epoch : int
        Images an epoch really uses, of all processes together.
    steps_per_epoch : int
        Batches of an epoch.

    Raises
    ------
    UserError
        There is a single image, and the batch size would drop it.
    """

    def __init__(self, images: int, batch_size: int) -> None:
        self.images_per_epoch = images - 1 if batch_size > 1 and images % batch_size == 1 else images
        self.steps_per_epoch = math.ceil(self.images_per_epoch / batch_size)
        if self.steps_per_epoch == 0:
            raise UserError(f"recipe.batch_size={batch_size}: cannot train on a single image")
        self._batch_size = batch_size

    def size(self, step: int) -> int:
        """Return how many images a batch has, of all processes together."""
        return min(self._batch_size, self.images_per_epoch - step * self._batch_size)

    def positions(self, step: int) -> slice:
        """Return where in the epoch this process's images of a batch are."""
        start = step * self._batch_size
        return self._shard.of_batch(start, start + self.size(step))
