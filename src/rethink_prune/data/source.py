"""The images of a data set with their labels, in memory or encoded, and what it tells about itself.

Subsets, statistics and batches are made of these.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, on the [0, 1] scale


@dataclass(frozen=True)
class ImageArray:
    """Images in memory with their labels.

    Attributes
    ----------
    images : torch.Tensor
        uint8, N x H x W x C, contiguous.
    labels : torch.Tensor
        int64, N.

    Examples
    --------
    >>> array = ImageArray(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    >>> len(array.take(torch.tensor([0, 2])))
    2
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, positions: torch.Tensor) -> ImageArray:
        """Return the images at these positions (int64, sorted, all different)."""
        # As many positions as images are all of them. No copy: a training set can fill half of the memory.
        if len(positions) == len(self):
            return self
        return ImageArray(self.images[positions], self.labels[positions])


class EncodedImages(ABC):
    """Images with their labels, decoded when they are needed: in files, or in the rows of a table.

    Attributes
    ----------
    root : Path
        The folder that holds them, absolute.
    labels : torch.Tensor
        int64, N.
    versions : numpy.ndarray or None
        For images that are decoded once, into an :class:`ImageArray`: each one's size in bytes and time of last
        modification in nanoseconds when it was listed (int64, N x 2). None for images that are decoded in every epoch.
    """

    root: Path
    labels: torch.Tensor
    versions: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    @abstractmethod
    def option(self) -> str:
        """The option that says where the images are, as errors name it."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Return the name of an image, which begins with its side and a slash."""

    @abstractmethod
    def read(self, position: int) -> npt.NDArray[np.uint8]:
        """Return an image as it is stored, not decoded: N bytes."""

    @abstractmethod
    def take(self, positions: torch.Tensor) -> Self:
        """Return the images at these positions (int64)."""

    @abstractmethod
    def digest(self, cache_dir: Path, *, progress: bool) -> str | None:
        """Return what stands for the images and labels in a fingerprint of images that are decoded in every epoch.

        None: what is in the images does not count.

        Parameters
        ----------
        cache_dir : Path
            Where the digest is kept, if it takes long.
        progress : bool
            Draw a progress bar, if the output is a terminal.
        """


@dataclass(frozen=True)
class ImageFiles(EncodedImages):
    """Image files with their labels.

    Attributes
    ----------
    root : Path
        The folder that names are relative to, absolute.
    names : numpy.ndarray
        N encoded names, with forward slashes.
    labels : torch.Tensor
        int64, N.
    versions : numpy.ndarray or None
        As of :class:`EncodedImages`.

    Examples
    --------
    >>> files = ImageFiles(Path("/photos"), np.array([b"cat/1.png", b"dog/1.png"]), torch.tensor([0, 1]))
    >>> files.take(torch.tensor([1])).name(0)
    'dog/1.png'
    """

    root: Path
    # One block of memory. Workers would copy a list of a million strings, page by page, as they count references.
    names: npt.NDArray[np.bytes_]
    labels: torch.Tensor
    versions: npt.NDArray[np.int64] | None = None

    @property
    def option(self) -> str:
        """The option that says where the files are, as errors name it."""
        return f"dataset.root={self.root}"

    def name(self, position: int) -> str:
        """Return the name of a file, relative to the root."""
        return os.fsdecode(bytes(self.names[position]))

    def read(self, position: int) -> npt.NDArray[np.uint8]:
        """Return the content of a file."""
        return np.fromfile(self.root / self.name(position), dtype=np.uint8)

    def digest(self, cache_dir: Path, *, progress: bool) -> str | None:
        """Return None: reading a million files would take as long as an epoch."""
        return None

    def take(self, positions: torch.Tensor) -> ImageFiles:
        """Return the files at these positions (int64)."""
        index = positions.numpy()
        versions = None if self.versions is None else self.versions[index]
        return ImageFiles(self.root, self.names[index], self.labels[positions], versions)


AnyImages = ImageArray | EncodedImages


def count_labels(labels: torch.Tensor, num_classes: int) -> tuple[int, ...]:
    """Return how many images each class has.

    Examples
    --------
    >>> count_labels(torch.tensor([0, 2, 2]), num_classes=4)
    (1, 0, 2, 0)
    """
    return tuple(torch.bincount(labels, minlength=num_classes).tolist())


@dataclass(frozen=True)
class Contents:
    """All images of a data set.

    Attributes
    ----------
    classes : tuple of str
        Class names in the order of the labels.
    train, test : AnyImages
        The two sides.
    statistics : Statistics, optional
        Where the field uses fixed values; otherwise they are computed from the training images. Images that are
        decoded in every epoch need fixed values.
    """

    classes: tuple[str, ...]
    train: AnyImages
    test: AnyImages
    statistics: Statistics | None = None


@dataclass(frozen=True)
class DataSource:
    """What is known about a data set without decoding an image.

    Attributes
    ----------
    image_size : int
        Height and width in pixels.
    channels : int
        3 or 1.
    train_counts, test_counts : tuple of int
        Images per class.
    load : callable
        Returns the contents; may download them.
    """

    image_size: int
    channels: int
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    load: Callable[[], Contents]

    @classmethod
    def from_contents(cls, contents: Contents, *, image_size: int, channels: int) -> DataSource:
        """Describe a data set whose labels are known already."""
        train, test = (count_labels(side.labels, len(contents.classes)) for side in (contents.train, contents.test))
        return cls(image_size, channels, train, test, load=lambda: contents)
