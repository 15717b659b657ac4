"""Images and labels in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Split:
    """Images with their labels.

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
