"""Seeded, class-balanced choices of images: the validation split and the limits.

A choice depends on ``split_seed`` and on the data set's own order (sorted names for a folder), so it is the same on
every machine. Each class draws by itself.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import count_labels
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator

T = TypeVar("T")


class Subsets(NamedTuple, Generic[T]):
    """One value for each of the three sets of images that a study uses."""

    train: T
    validation: T
    test: T


def count_subsets(options: DatasetConfig, train: Sequence[int], test: Sequence[int]) -> Subsets[list[int]]:
    """Return how many images of each class the sets get, from how many of each class both sides have.

    Raises
    ------
    UserError
        A limit is above what there is; or the fraction to hold out is too small to hold out an image, or leaves a class
        empty.

    Examples
    --------
    >>> options = DatasetConfig(name="digits", validation=0.2, train_limit=4)
    >>> count_subsets(options, train=[10, 10], test=[5, 5])
    Subsets(train=[2, 2], validation=[2, 2], test=[5, 5])
    """
    held_out = _hold_out(options.validation, train)
    left = [count - out for count, out in zip(train, held_out, strict=True)]
    return Subsets(
        # The limit comes after the hold-out, so that a smaller training set is validated on the same images.
        train=_share_limit(left, options.train_limit, options.split_seed, "train"),
        validation=held_out,
        test=_share_limit(test, options.test_limit, options.split_seed, "test"),
    )


def choose_subsets(
    options: DatasetConfig, train: torch.Tensor, test: torch.Tensor, num_classes: int
) -> Subsets[torch.Tensor]:
    """Return which images the sets get, from the labels of both sides (int64); raises as :func:`count_subsets` does.

    Returns
    -------
    Subsets of torch.Tensor
        Sorted positions (int64): those of train and validation on the train side, those of test on the test side.

    Examples
    --------
    >>> labels = torch.tensor([0, 1, 0, 1])
    >>> chosen = choose_subsets(DatasetConfig(name="digits", test_limit=2), labels, labels, num_classes=2)
    >>> chosen.train.tolist(), labels[chosen.test].sort().values.tolist()
    ([0, 1, 2, 3], [0, 1])
    """
    counts = count_subsets(options, count_labels(train, num_classes), count_labels(test, num_classes))
    held_out = _draw_images(train, counts.validation, options.split_seed, "validation")
    remaining = torch.from_numpy(np.setdiff1d(np.arange(len(train)), held_out.numpy(), assume_unique=True))
    return Subsets(
        train=remaining[_draw_images(train[remaining], counts.train, options.split_seed, "train_limit")],
        validation=held_out,
        test=_draw_images(test, counts.test, options.split_seed, "test_limit"),
    )


def _hold_out(fraction: float, counts: Sequence[int]) -> list[int]:
    held_out = [int(count * fraction + 0.5) for count in counts]
    if fraction and not any(held_out):
        raise UserError(f"dataset.validation={fraction}: holds out no image of {sum(counts)}")
    if any(out and out == count for out, count in zip(held_out, counts, strict=True)):
        raise UserError(f"dataset.validation={fraction}: leaves a class without training images")
    return held_out


def _share_limit(counts: Sequence[int], limit: int | None, seed: int, side: str) -> list[int]:
    """Share `limit` images among the classes; they differ by one at most, unless one has too few."""
    if limit is None:
        return list(counts)
    if limit > sum(counts):
        raise UserError(f"dataset.{side}_limit={limit}: there are only {sum(counts)} {side} images")
    # Where the limit does not divide evenly, chance says which classes give one more.
    ranking = torch.randperm(len(counts), generator=derive_generator(seed, f"{side}_limit")).tolist()
    shares = [0] * len(counts)
    # Each round fills up small classes; the next shares what they could not give among the others.
    while (left := limit - sum(shares)) > 0:
        open_classes = [c for c in ranking if shares[c] < counts[c]]
        share = max(1, left // len(open_classes))
        for c in open_classes[:left]:
            shares[c] = min(counts[c], shares[c] + share)
    return shares


def _draw_images(labels: torch.Tensor, counts: Sequence[int], seed: int, purpose: str) -> torch.Tensor:
    """Return the sorted positions of ``counts[c]`` images of every class ``c``, drawn at random."""
    members = torch.argsort(labels, stable=True).split(count_labels(labels, len(counts)))
    drawn = [
        # A class has a generator of its own, so that its draw does not depend on the sizes of other classes.
        group[torch.randperm(len(group), generator=derive_generator(seed, purpose, c))[:count]]
        for c, (group, count) in enumerate(zip(members, counts, strict=True))
    ]
    return torch.cat(drawn).sort().values
