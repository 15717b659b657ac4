"""What every kind of data set offers before subsets, statistics and batches are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rethink_prune.data.split import Files

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Pool:
    """All images of one side, train or test.

    Attributes
    ----------
    labels : torch.Tensor
        int64, N.
    read : callable
        Takes sorted positions (int64, M) and returns those images, uint8, M x H x W x C, contiguous.
    """

    labels: torch.Tensor
    read: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """A data set whose labels are known and whose images can be read.

    Attributes
    ----------
    classes : tuple of str
        Class names in the order of the labels.
    train, test : Pool
        The two sides.
    statistics : pair of tuple of float, or None
        Mean and standard deviation per channel on the [0, 1] scale, where the field uses fixed values;
        otherwise they are computed from the training images.
    in_memory : bool
        Whether the images take up memory already; otherwise reading a pool decodes them into new memory.
    """

    classes: tuple[str, ...]
    train: Pool
    test: Pool
    statistics: Statistics | None = None
    in_memory: bool = True


@dataclass(frozen=True)
class ListedContents:
    """A data set whose images stay in their files and are decoded in every epoch.

    Attributes
    ----------
    classes : tuple of str
        Class names in the order of the labels.
    train, test : Files
        The two sides.
    statistics : pair of tuple of float
        As of :class:`Contents`.
    """

    classes: tuple[str, ...]
    train: Files
    test: Files
    statistics: Statistics


@dataclass(frozen=True)
class Source:
    """What is known about a data set without decoding an image.

    Attributes
    ----------
    image_size : int
        Height and width in pixels.
    channels : int
        Channels of the images, 3 or 1 except for a user's own data set.
    train_counts, test_counts : tuple of int
        Images per class.
    open : callable
        Takes the cache folder and whether to show progress; returns the contents.
    """

    image_size: int
    channels: int
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    open: Callable[[Path, bool], Contents | ListedContents]


def memory_pool(images: torch.Tensor, labels: torch.Tensor) -> Pool:
    """Return the pool of images that are in memory already (uint8, N x H x W x C)."""

    def read(indices: torch.Tensor) -> torch.Tensor:
        # Sorted positions that are as many as there are images are all of them: no copy.
        return images if len(indices) == len(images) else images[indices]

    return Pool(labels, read)
