"""Images with their labels: in memory, or in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch


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


@dataclass(frozen=True)
class ImageFiles:
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
        For files that are decoded once, into an :class:`ImageArray`: each file's size in bytes and time of last
        modification in nanoseconds when it was listed (int64, N x 2). None for files that are decoded in every epoch.

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

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def name(self, position: int) -> str:
        """Return the name of a file, relative to the root."""
        return os.fsdecode(bytes(self.names[position]))

    def take(self, positions: torch.Tensor) -> ImageFiles:
        """Return the files at these positions (int64)."""
        index = positions.numpy()
        versions = None if self.versions is None else self.versions[index]
        return ImageFiles(self.root, self.names[index], self.labels[positions], versions)


AnyImages = ImageArray | ImageFiles


def count_labels(labels: torch.Tensor, num_classes: int) -> tuple[int, ...]:
    """Return how many images each class has.

    Examples
    --------
    >>> count_labels(torch.tensor([0, 2, 2]), num_classes=4)
    (1, 0, 2, 0)
    """
    return tuple(torch.bincount(labels, minlength=num_classes).tolist())
