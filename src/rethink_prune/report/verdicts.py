"""Comparisons in words: one plain sentence each, which says no more than its seeds do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rethink_prune.report.statistics import LEVEL

if TYPE_CHECKING:
    from rethink_prune.report.comparison import Comparison

# What a table's columns are called; an arm that is not here goes by its own name.
TITLES = {
    "large": "unpruned",
    "finetune": "fine-tuned",
    "scratch_e": "Scratch-E",
    "scratch_b": "Scratch-B",
    "large_longer": "unpruned, longer",
    "sparse": "sparse",
    "pruned": "pruned, not retrained",
}
# And what they are called in a sentence.
NAMES = {**TITLES, "finetune": "fine-tuning", "large": "the unpruned network"}


def verdict(comparison: Comparison, *, margin: float, family: int, recipe: str, budget: str) -> str:
    """Say what a comparison shows.

    Parameters
    ----------
    comparison : Comparison
        With corrected p values.
    margin : float
        Points within which arms count as equivalent.
    family : int
        Number of comparisons the p values are corrected for.
    recipe, budget : str
        Names of the recipe and the budget rule, without which a comparison means little.
    """
    first, second = (NAMES.get(name, name) for name in (comparison.first, comparison.second))
    conditions = f"({recipe} recipe, {budget} budget)"
    difference = comparison.difference
    if difference is None:
        return f"{_start(first)} and {second} {conditions} cannot be compared: no seed has both."
    mean = difference.mean
    if mean < 0:
        first, second = second, first
    pair, points, n = f"{_start(first)} and {second} {conditions}", f"{abs(mean):.2f} points", difference.n
    if n == 1:
        ahead = f"is {points} above {second} {conditions}" if mean else f"equals {second} {conditions}"
        return f"{_start(first)} {ahead} with one seed: no interval and no test."
    if difference.interval is None:
        if not mean:
            return f"{pair} end at the same accuracy in each of {n} seeds: no interval."
        word = "better than" if _reached(comparison.p_holm) else "ahead of"
        same = (
            f"{_start(first)} is {word} {second} {conditions} by {points} in each of {n} seeds: no spread, no interval"
        )
        return f"{same}{_limit(comparison, family)}."
    low, high = difference.interval if mean >= 0 else (-difference.interval[1], -difference.interval[0])
    found = f"{points} [{low:.2f}, {high:.2f}], n = {n}"
    ahead = f"{first} is ahead by {found}" if mean else f"their means are equal: {found}"
    equivalent = _reached(comparison.p_equivalent_holm)
    if _reached(comparison.p_holm) and low <= 0:
        return (
            f"{pair}: {ahead}; the permutation test shows a difference (p = {comparison.p_holm:.2g}), the interval "
            "does not: the differences are spread too unevenly to say more."
        )
    if _reached(comparison.p_holm):
        within = f", a difference within the margin of {margin:g} points" if equivalent else ""
        return f"{_start(first)} is better than {second} {conditions} by {found}{within}."
    if equivalent:
        return f"{pair} are equivalent within {margin:g} points: {ahead}."
    return (
        f"{pair} are not shown to differ, nor to be equivalent within {margin:g} points: {ahead}"
        f"{_limit(comparison, family)}."
    )


def _limit(comparison: Comparison, family: int) -> str:
    """Return what to add where no difference is shown: what n or the number of comparisons has to do with it."""
    difference = comparison.difference
    if difference is None or _reached(comparison.p_holm):
        return ""
    if not _reached(difference.p_floor):
        return f"; {difference.n} seeds cannot show a difference: the smallest p they allow is {difference.p_floor:.2g}"
    if not _reached(comparison.p_holm_floor):
        return (
            f"; {difference.n} seeds cannot show a difference among {family} comparisons: the smallest p they allow is "
            f"{difference.p_floor:.2g}, {comparison.p_holm_floor:.2g} after correction"
        )
    if _reached(difference.p):
        return f"; p = {difference.p:.2g}, {comparison.p_holm:.2g} after correction for {family} comparisons"
    return ""


def _reached(p: float | None) -> bool:
    return p is not None and p <= LEVEL


def _start(name: str) -> str:
    return name[:1].upper() + name[1:]
