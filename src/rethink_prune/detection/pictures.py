"""What a detection set is: pictures, and the objects in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects in one picture.

    Boxes have edges: x from 0 to the picture's width, y from 0 to its height, so a box over the whole picture is
    ``0, 0, width, height``, and a mirrored box begins at ``width - right``. torchvision's detectors count likewise.
    Measure with ``voc_map(..., inclusive=False)``, which gives what VOC's program gives for the pixels in VOC's files.

    Attributes
    ----------
    boxes : torch.Tensor
        float32, N x 4: left, top, right, bottom, in pixels of the picture; none is empty.
    labels : torch.Tensor
        int64, N, from 1; 0 is the background.
    difficult : torch.Tensor
        bool, N: not to be trained on, and neither right nor wrong in tests.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    difficult: torch.Tensor

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.labels)


class Pictures(Protocol):
    """One side of a detection set, to train on or to test with."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; label k is ``classes[k - 1]``."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides results, in hexadecimal; paths have no part in it."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every picture, known without decoding any."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def picture(self, index: int) -> torch.Tensor:
        """Return a picture: uint8, 3 x height x width."""

    def objects(self, index: int) -> Objects:
        """Return what is in it."""


@dataclass(frozen=True)
class DetectionData:
    """A detection set: every picture to train on holds an object that is not difficult; those to test with need not.

    Attributes
    ----------
    name : str
        As in ``transfer.name``.
    train, test : Pictures
        The two sides, with the same classes.
    """

    name: str
    train: Pictures
    test: Pictures
