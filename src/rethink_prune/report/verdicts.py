"""A comparison in words: one plain sentence, which says no more than its seeds do."""

from rethink_prune.report.comparisons import ArmComparison
from rethink_prune.report.networks import network_label
from rethink_prune.report.statistics import LEVEL, Difference


def verdict(comparison: ArmComparison, *, margin: float, family: int, recipe: str, budget: str) -> str:
    """Say what a comparison shows.

    Parameters
    ----------
    comparison
        With corrected p values.
    margin
        Points within which two arms count as equivalent.
    family
        Number of comparisons the p values are corrected for.
    recipe, budget
        Names of the recipe and the budget rule, without which a comparison means little.

    Examples
    --------
    >>> from rethink_prune.report.statistics import paired_difference
    >>> comparison = ArmComparison("scratch_b", "finetune", (0,), paired_difference([93.5], [93.0], margin=0.5))
    >>> verdict(comparison, margin=0.5, family=1, recipe="paper", budget="paper")
    'Scratch-B is 0.50 points above fine-tuning (paper recipe, paper budget) with one seed: no interval and no test.'
    """
    first, second = (network_label(arm).name for arm in (comparison.first, comparison.second))
    difference = comparison.difference
    if difference is not None and difference.mean < 0:
        # From here on, `first` is the arm that is ahead.
        first, second = second, first
    start, other = _capitalised(first), f"{second} ({recipe} recipe, {budget} budget)"
    pair = f"{start} and {other}"
    if difference is None:
        return f"{pair} cannot be compared: no seed has both."
    mean, n, points = difference.mean, difference.n, f"{abs(difference.mean):.2f} points"
    # One difference has no spread to be compared with.
    if n == 1:
        ahead = f"is {points} above {other}" if mean else f"equals {other}"
        return f"{start} {ahead} with one seed: no interval and no test."
    shown = _reaches_level(comparison.p_holm)
    limit = "" if shown else _limit_of_seeds(comparison, difference, family)
    if difference.interval is None:
        if not mean:
            return f"{pair} end at the same accuracy in each of {n} seeds: no interval."
        word = "better than" if shown else "ahead of"
        return f"{start} is {word} {other} by {points} in each of {n} seeds: no spread, no interval{limit}."
    low, high = difference.interval if mean >= 0 else (-difference.interval[1], -difference.interval[0])
    found = f"{points} [{low:.2f}, {high:.2f}], n = {n}"
    ahead = f"{first} is ahead by {found}" if mean else f"their means are equal: {found}"
    equivalent = _reaches_level(comparison.p_equivalent_holm)
    # The permutation test assumes no distribution and the interval does, so they can disagree.
    if shown and low <= 0:
        return (
            f"{pair}: {ahead}; the permutation test shows a difference (p = {comparison.p_holm:.2g}), the interval "
            "does not: the differences are spread too unevenly to say more."
        )
    if shown:
        within = f", a difference within the margin of {margin:g} points" if equivalent else ""
        return f"{start} is better than {other} by {found}{within}."
    if equivalent:
        return f"{pair} are equivalent within {margin:g} points: {ahead}."
    return f"{pair} are not shown to differ, nor to be equivalent within {margin:g} points: {ahead}{limit}."


def _limit_of_seeds(comparison: ArmComparison, difference: Difference, family: int) -> str:
    """Return why no difference is shown, if the number of seeds or of comparisons has to do with it."""
    n = difference.n
    # No n below six can reach 5 %: that says something about n, not about the arms.
    if not _reaches_level(difference.p_floor):
        return f"; {n} seeds cannot show a difference: the smallest p they allow is {difference.p_floor:.2g}"
    if not _reaches_level(comparison.p_holm_floor):
        return (
            f"; {n} seeds cannot show a difference among {family} comparisons: the smallest p they allow is "
            f"{difference.p_floor:.2g}, {comparison.p_holm_floor:.2g} after correction"
        )
    if _reaches_level(difference.p):
        return f"; p = {difference.p:.2g}, {comparison.p_holm:.2g} after correction for {family} comparisons"
    return ""


def _reaches_level(p: float | None) -> bool:
    return p is not None and p <= LEVEL


def _capitalised(name: str) -> str:
    # str.capitalize would turn the rest into small letters: "Scratch-E".
    return name[:1].upper() + name[1:]
