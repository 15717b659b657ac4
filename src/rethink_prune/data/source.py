"""What a data set tells about itself, before subsets, statistics and batches are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rethink_prune.data.images import AnyImages, count_labels

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, on the [0, 1] scale


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
