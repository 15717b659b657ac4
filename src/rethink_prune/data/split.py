"""Images with their labels: in memory, or in files that are read again and again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Split:
    """Images in memory with their labels.

    Attributes
    ----------
    images : torch.Tensor
        uint8, N x H x W x C, contiguous.
    labels : torch.Tensor
        int64, N.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclass(frozen=True)
class Files:
    """Image files with their labels: too many to decode them all beforehand.

    Attributes
    ----------
    root : Path
        The folder that names are relative to, absolute.
    names : numpy.ndarray
        N encoded names in one block of memory: a list of a million strings would be copied, page by page, into every
        worker that looks at it.
    labels : torch.Tensor
        int64, N.
    """

    root: Path
    names: npt.NDArray[np.bytes_]
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the name of an image, relative to the root."""
        return os.fsdecode(bytes(self.names[index]))

    def take(self, indices: torch.Tensor) -> Files:
        """Return the images at these positions (int64)."""
        return Files(self.root, self.names[indices.numpy()], self.labels[indices])
