"""Batches: what a training loop asks of them, how processes share them, and how they are made of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data.dataset import ImageDataset
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.mixing import Mixing
from rethink_prune.data.normalization import Batch, Normalization
from rethink_prune.data.source import AnyImages, EncodedImages
from rethink_prune.data.streamed_images import StreamedImages
from rethink_prune.data.workers import BatchReader
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

        Examples
        --------
        >>> Shard(0, 3).copies(6), Shard(0, 3).copies(5)
        (1, 3)
        """
        # Batch normalisation needs two images. A batch without two for every process (the last of an epoch) is not
        # shared: every process computes the whole of it.
        return 1 if images >= 2 * self.world else self.world

    def of_batch(self, start: int, stop: int) -> slice:
        """Return this process's part of a training batch at the positions ``[start, stop)`` of an epoch.

        Examples
        --------
        >>> Shard(1, 3).of_batch(0, 6), Shard(1, 3).of_batch(0, 5)
        (slice(2, 4, None), slice(0, 5, None))
        """
        return self.of(start, stop) if self.copies(stop - start) == 1 else slice(start, stop)

    def weight(self, part: int, images: int) -> float:
        """Return what the mean over this process's part of a training batch counts for.

        The mean over all processes of their weighted means is the mean over the batch.

        Parameters
        ----------
        part, images : int
            Images in this process's part, and in the batch.

        Examples
        --------
        >>> [Shard(rank, 2).weight(part, images=5) for rank, part in enumerate((2, 3))]
        [0.8, 1.2]
        """
        return part * self.world / (images * self.copies(images))


UNSHARED = Shard()


class Batches(Protocol):
    """What the training loop asks of batches, whatever they hold."""

    @property
    def images_per_epoch(self) -> int:
        """Images, or pictures, an epoch really uses, of all processes together."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""

    def size(self, step: int) -> int:
        """Return how many images a batch has, of all processes together."""

    def part(self, shard: Shard) -> Self:
        """Return the same batches, of which one process takes its part."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of an epoch from a step on, or this process's part of each: images, and what is known."""


@dataclass(frozen=True)
class TrainBatches:
    """Shuffled, augmented batches. A partial last batch is kept, except for a single image.

    Attributes
    ----------
    images : DeviceImages or StreamedImages
        The training images.
    batch_size : int
        Images per batch, of all processes together.
    shard : Shard
        Which part of every batch this process takes.
    mixing : Mixing, optional
        Mixes the images of a batch.

    Raises
    ------
    UserError
        There is a single image, and the batch size would drop it.
    """

    images: DeviceImages | StreamedImages
    batch_size: int
    shard: Shard = UNSHARED
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(f"recipe.batch_size={self.batch_size}: cannot train on a single image")

    @property
    def images_per_epoch(self) -> int:
        """Images an epoch really uses, of all processes together."""
        count = len(self.images)
        # Batch normalisation cannot take a variance from a single image.
        return count - 1 if self.batch_size > 1 and count % self.batch_size == 1 else count

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.images_per_epoch / self.batch_size)

    def size(self, step: int) -> int:
        """Return how many images a batch has, of all processes together."""
        return min(self.batch_size, self.images_per_epoch - step * self.batch_size)

    def part(self, shard: Shard) -> TrainBatches:
        """Return the same batches, of which one process takes its part; memory and workers are shared."""
        return replace(self, shard=shard)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, or this process's part of each.

        Parameters
        ----------
        epoch : int
            Which epoch's order and augmentation.
        start_step : int
            Batches to leave out at the start: those a resumed run has done already.
        """
        starts = range(start_step * self.batch_size, self.images_per_epoch, self.batch_size)
        parts = [self._positions(start, min(start + self.batch_size, self.images_per_epoch)) for start in starts]
        batches = self.images.train(epoch, parts)
        if self.mixing is None:
            return batches
        mix = partial(self.mixing, epoch=epoch)
        return (mix(*batch, start=start) for batch, start in zip(batches, starts, strict=True))

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        """Return this process's positions of a batch; where images are mixed, after that of the first one's partner."""
        part = self.shard.of_batch(start, stop)
        positions = torch.arange(part.start, part.stop)
        if self.mixing is None:
            return positions
        partner = (stop if part.start == start else part.start) - 1
        return torch.cat([torch.tensor([partner]), positions])


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch, not mixed: every image has one class. They can be gone through any number of times."""

    batches: TrainBatches
    epoch: int

    def __iter__(self) -> Iterator[Batch]:
        return replace(self.batches, mixing=None).epoch(self.epoch)


@dataclass(frozen=True)
class EvalBatches:
    """Every image exactly once, in order, not augmented; attributes as of :class:`TrainBatches`."""

    images: DeviceImages | StreamedImages
    batch_size: int
    shard: Shard = UNSHARED

    def __len__(self) -> int:
        """Return the number of images, of all processes together."""
        return len(self.images)

    def part(self, shard: Shard) -> EvalBatches:
        """Return the images of one process; those of all processes make up the whole."""
        return replace(self, shard=shard)

    def __iter__(self) -> Iterator[Batch]:
        own = self.shard.of(0, len(self))
        starts = range(own.start, own.stop, self.batch_size)
        return self.images.evaluate([slice(start, min(start + self.batch_size, own.stop)) for start in starts])


def train_batches(
    dataset: ImageDataset,
    options: DatasetConfig,
    *,
    batch_size: int,
    augment: bool,
    device: torch.device,
    seed: int,
    rand_augment: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> TrainBatches:
    """Return the shuffled training images: kept on the device, or streamed to it by ``options.workers`` processes.

    Parameters
    ----------
    dataset : ImageDataset
        As loaded with `options`.
    options : DatasetConfig
        How images are augmented and read.
    batch_size : int
        Images per batch, of all processes together.
    augment : bool
        Random crops and flips; otherwise images are shuffled only.
    device : torch.device
        Where the batches go.
    seed : int
        The study's seed; with the epoch and the position in it, it decides every draw.
    rand_augment : int
        Strength of :mod:`~rethink_prune.data.rand_augment`, to 30; 0: without.
    mixup, cutmix : float
        As for :class:`~rethink_prune.data.mixing.Mixing`; without either, images are not mixed.

    Raises
    ------
    UserError
        There is a single image, and the batch size would drop it; or shared memory is too small for the workers.

    Examples
    --------
    >>> from rethink_prune.data import ImageArray
    >>> array = ImageArray(torch.zeros(10, 4, 4, 1, dtype=torch.uint8), torch.arange(10))
    >>> dataset = ImageDataset("mine", array, None, array, ("a", "b"), (0.5,), (0.5,), 4, "")
    >>> options = DatasetConfig(name="mine", pad=1)
    >>> cpu = torch.device("cpu")
    >>> batches = train_batches(dataset, options, batch_size=4, augment=True, device=cpu, seed=0)
    >>> [tuple(images.shape) for images, labels in batches.epoch(0)]
    [(4, 1, 4, 4), (4, 1, 4, 4), (2, 1, 4, 4)]
    """
    normalize = Normalization(dataset.mean, dataset.std, image_size=dataset.image_size, device=device)
    flip = options.flip and augment
    mixing = Mixing(mixup, cutmix, len(dataset.classes), seed) if mixup or cutmix else None
    if isinstance(dataset.train, EncodedImages):
        reader = BatchReader(
            dataset.train, dataset.image_size, seed, augment=augment, flip=flip, rand_augment=rand_augment
        )
        largest = batch_size + 1 if mixing else batch_size
        streamed = StreamedImages(reader, normalize, batch_size=largest, workers=options.workers)
        return TrainBatches(streamed, batch_size, mixing=mixing)
    pad = options.pad if augment else 0
    images = DeviceImages(dataset.train, normalize, pad=pad, flip=flip, seed=seed, rand_augment=rand_augment)
    return TrainBatches(images, batch_size, mixing=mixing)


def eval_batches(
    dataset: ImageDataset, images: AnyImages, *, batch_size: int, device: torch.device, workers: int | None = None
) -> EvalBatches:
    """Return every image once, in order, not augmented.

    Parameters
    ----------
    dataset : ImageDataset
        Says how images are normalised.
    images : AnyImages
        One of the dataset's train, validation and test.
    batch_size : int
        Images per batch; the last may be smaller.
    device : torch.device
        Where the batches go.
    workers : int, optional
        Processes that read images in files; 0 reads in this one, None takes one for every core, at most 16.

    Raises
    ------
    UserError
        Shared memory is too small for the workers.

    Examples
    --------
    >>> from rethink_prune.data import ImageArray
    >>> array = ImageArray(torch.zeros(10, 4, 4, 1, dtype=torch.uint8), torch.arange(10))
    >>> dataset = ImageDataset("mine", array, None, array, ("a", "b"), (0.5,), (0.5,), 4, "")
    >>> batches = eval_batches(dataset, dataset.test, batch_size=6, device=torch.device("cpu"))
    >>> [labels.tolist() for images, labels in batches]
    [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    """
    normalize = Normalization(dataset.mean, dataset.std, image_size=dataset.image_size, device=device)
    if isinstance(images, EncodedImages):
        reader = BatchReader(images, dataset.image_size)
        return EvalBatches(StreamedImages(reader, normalize, batch_size=batch_size, workers=workers), batch_size)
    return EvalBatches(DeviceImages(images, normalize), batch_size)
