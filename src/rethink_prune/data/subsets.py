"""Seeded, class-balanced choices of images: the validation split and the limits.

A choice depends on the seed and on the data set's own order (sorted names for a folder), so it is the same on
every machine, and each class draws by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator


class Counts(NamedTuple):
    """Images of each class that the three splits get."""

    train: list[int]
    validation: list[int]
    test: list[int]


class Positions(NamedTuple):
    """Which images the three splits get: sorted positions (int64) on the train side or on the test side."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


@dataclass(frozen=True)
class Subsets:
    """Which part of a data set is used.

    Attributes
    ----------
    validation : float
        Fraction of each class's training images that is held out, in [0, 1); taken before `train_limit`.
    train_limit, test_limit : int or None
        Images used in total, shared evenly among the classes; None uses all.
    seed : int
        Decides which images.
    """

    validation: float
    train_limit: int | None
    test_limit: int | None
    seed: int

    def count(self, train: Sequence[int], test: Sequence[int]) -> Counts:
        """Return what the splits get, from how many images of each class both sides have.

        Raises
        ------
        UserError
            A limit is below 1 or above what there is; or the fraction is outside [0, 1), holds out nothing
            although it is not 0, or leaves a class empty.
        """
        held = self._hold_out(train)
        left = [count - out for count, out in zip(train, held, strict=True)]
        return Counts(
            train=self._share(left, self.train_limit, "train"),
            validation=held,
            test=self._share(test, self.test_limit, "test"),
        )

    def choose(self, train: torch.Tensor, test: torch.Tensor, num_classes: int) -> Positions:
        """Return the splits' images, from the labels of both sides (int64); raises as :meth:`count` does."""
        counts = self.count(
            torch.bincount(train, minlength=num_classes).tolist(),
            torch.bincount(test, minlength=num_classes).tolist(),
        )
        held = self._draw(train, counts.validation, "validation")
        left = torch.ones(len(train), dtype=torch.bool)
        left[held] = False
        left_positions = left.nonzero().flatten()
        return Positions(
            train=left_positions[self._draw(train[left_positions], counts.train, "train_limit")],
            validation=held,
            test=self._draw(test, counts.test, "test_limit"),
        )

    def _hold_out(self, counts: Sequence[int]) -> list[int]:
        option = f"dataset.validation={self.validation}"
        if not 0 <= self.validation < 1:
            raise UserError(f"{option}: must be in [0, 1)")
        held = [int(count * self.validation + 0.5) for count in counts]
        if self.validation and not any(held):
            raise UserError(f"{option}: holds out no image of {sum(counts)}")
        if any(out and out == count for out, count in zip(held, counts, strict=True)):
            raise UserError(f"{option}: leaves a class without training images")
        return held

    def _share(self, counts: Sequence[int], limit: int | None, side: str) -> list[int]:
        """Share `limit` images among the classes; they differ by one at most, unless one has too few."""
        if limit is None:
            return list(counts)
        option = f"dataset.{side}_limit={limit}"
        if limit < 1:
            raise UserError(f"{option}: must be at least 1")
        if limit > sum(counts):
            raise UserError(f"{option}: there are only {sum(counts)} {side} images")
        # Where the limit does not divide evenly, chance says which classes give one more.
        ranking = torch.randperm(len(counts), generator=derive_generator(self.seed, f"{side}_limit")).tolist()
        shares = [0] * len(counts)
        while (left := limit - sum(shares)) > 0:
            open_classes = [c for c in ranking if shares[c] < counts[c]]
            share = max(1, left // len(open_classes))
            for c in open_classes[:left]:
                shares[c] = min(counts[c], shares[c] + share)
        return shares

    def _draw(self, labels: torch.Tensor, counts: Sequence[int], purpose: str) -> torch.Tensor:
        """Draw ``counts[c]`` images of every class ``c``."""
        sizes = torch.bincount(labels, minlength=len(counts)).tolist()
        members = torch.argsort(labels, stable=True).split(sizes)
        drawn = [
            group[torch.randperm(len(group), generator=derive_generator(self.seed, purpose, c))[:count]]
            for c, (group, count) in enumerate(zip(members, counts, strict=True))
        ]
        return torch.cat(drawn).sort().values
