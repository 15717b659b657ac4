"""Which arms of a study are compared, seed by seed; their p values, corrected for a whole table; and their verdicts."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rethink_prune.report.networks import has_own_name, in_column_order, network_label, split_name, trains_pruned
from rethink_prune.report.records import RunRecord, TrainedRecord
from rethink_prune.report.statistics import LEVEL, Difference, holm, paired_difference

# What tickets are compared with at their own length, by the families of arms.
_TICKET_PAIRS = (
    ("lottery", "scratch"),
    ("lottery", "reshuffle"),
    ("weight_rewind", "scratch"),
    ("weight_rewind", "lottery"),
)


@dataclass(frozen=True)
class ArmComparison:
    """Two arms over the seeds that have both.

    Attributes
    ----------
    difference
        Of `first` minus `second`; None if no seed has both.
    p_holm, p_holm_floor, p_equivalent_holm
        Corrected for all comparisons of the table: the p value, the smallest that the seeds allow, and the p value of
        the equivalence test. None where there is no test.
    verdict
        What the comparison shows, in one sentence.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: Difference | None
    p_holm: float | None = None
    p_holm_floor: float | None = None
    p_equivalent_holm: float | None = None
    verdict: str = ""

    @property
    def tested(self) -> Difference | None:
        """The difference, if it rests on more than one seed."""
        return self.difference if self.difference is not None and self.difference.n > 1 else None


def planned_networks(runs: Sequence[RunRecord]) -> list[str]:
    """Return every network that a run trained or was asked for, in the order of columns."""
    return in_column_order({name for run in runs for name in (*run.trained, *run.study.arms)})


def compare_arms(runs: Sequence[RunRecord], *, margin: float, apart: Collection[str] = ()) -> Iterator[ArmComparison]:
    """Yield every arm of the pruned network against fine-tuning; without that, against the first one. Then the tickets.

    A ticket, and one with weights of an early epoch, is also compared with training from scratch for the same length,
    and with its controls. Where their length was typed, these arms are compared with each other alone.

    Parameters
    ----------
    runs
        One for each seed.
    margin
        Points within which arms count as equivalent.
    apart
        Arms that are compared elsewhere.
    """
    tickets = list(_ticket_pairs(runs))
    apart = {*apart, *(arm for pair in tickets for arm in pair if not has_own_name(arm))}
    # In the order of columns: the first one is fine-tuning, if any run has it.
    contenders = [network for network in planned_networks(runs) if trains_pruned(network) and network not in apart]
    pairs = [(first, contenders[0]) for first in contenders[1:]]
    # Without fine-tuning, some of them are there already, in either order.
    pairs += [(one, other) for one, other in tickets if not {(one, other), (other, one)} & {*pairs}]
    for first, second in pairs:
        # All arms of a seed see the same images in the same order, so only differences within a seed count.
        found = [(seed, a.top1, b.top1) for seed, a, b in _both(first, second, runs)]
        seeds, ours, theirs = zip(*found, strict=True) if found else ((), (), ())
        yield compare_pair(first, second, seeds, ours, theirs, margin=margin)


def _ticket_pairs(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Yield each ticket with each arm that it is compared with: of the same length by name, else in epochs if typed."""
    planned = planned_networks(runs)
    for family, rivals in _TICKET_PAIRS:
        for first in (network for network in planned if split_name(network)[0] == family):
            of_family = [network for network in planned if split_name(network)[0] == rivals]
            typed = [second for second in of_family if split_name(second)[1] == split_name(first)[1]]
            equal = typed or [second for second in of_family if _equally_long(first, second, runs)]
            if equal:
                yield first, equal[0]


def _equally_long(first: str, second: str, runs: Sequence[RunRecord]) -> bool:
    """Tell whether two arms, one of a typed length, had the same epochs in all runs that finished both, one or more."""
    if has_own_name(first) and has_own_name(second):
        return False
    epochs = [(a.epochs, b.epochs) for _, a, b in _both(first, second, runs)]
    return bool(epochs) and all(one is not None and one == other for one, other in epochs)


def _both(first: str, second: str, runs: Sequence[RunRecord]) -> list[tuple[int, TrainedRecord, TrainedRecord]]:
    """Return the seed and both arms of each run that finished them."""
    return [
        (run.study.seed, run.arms[first], run.arms[second])
        for run in runs
        if all(arm in run.arms and run.arms[arm].finished for arm in (first, second))
    ]


def compare_pair(
    first: str, second: str, seeds: Sequence[int], ours: Sequence[float], theirs: Sequence[float], *, margin: float
) -> ArmComparison:
    """Compare two arms by their accuracies in percent, of the same seeds in the same order.

    Examples
    --------
    >>> compare_pair("scratch_b", "finetune", [0, 1], [93.0, 94.0], [92.0, 92.0], margin=0.5).difference.mean
    1.5
    """
    difference = paired_difference(ours, theirs, margin=margin) if seeds else None
    return ArmComparison(first, second, tuple(seeds), difference)


def correct_for_table(rows: Sequence[Sequence[ArmComparison]]) -> list[list[ArmComparison]]:
    """Return the comparisons of a table's rows with p values corrected for all that are tested."""
    # A single pair has no test. Counting it would only make the correction of the others stricter.
    tests = [difference for row in rows for comparison in row if (difference := comparison.tested) is not None]
    p = _holm_by_value([test.p for test in tests])
    floor = _holm_by_value([test.p_floor for test in tests])
    equivalent = _holm_by_value([test.p_equivalent for test in tests])

    def corrected(comparison: ArmComparison) -> ArmComparison:
        test = comparison.tested
        if test is None:
            return comparison
        equivalence = equivalent.get(test.p_equivalent)
        return replace(comparison, p_holm=p[test.p], p_holm_floor=floor[test.p_floor], p_equivalent_holm=equivalence)

    return [list(map(corrected, row)) for row in rows]


def _holm_by_value(ps: Sequence[float | None]) -> dict[float | None, float]:
    """Return the corrected p values by the uncorrected ones; None is no test."""
    known = [p for p in ps if p is not None]
    # By value is enough: Holm's method corrects equal p values equally.
    return dict(zip(known, holm(known), strict=True))


def verdict(comparison: ArmComparison, *, margin: float, family: int, conditions: str) -> str:
    """Say what a comparison shows in one plain sentence, which says no more than its seeds do.

    Parameters
    ----------
    comparison
        With corrected p values.
    margin
        Points within which two arms count as equivalent.
    family
        Number of comparisons the p values are corrected for.
    conditions
        What the arms have in common and a comparison means little without: recipe, budget rule and precision.

    Examples
    --------
    >>> comparison = ArmComparison("scratch_b", "finetune", (0,), paired_difference([93.5], [93.0], margin=0.5))
    >>> verdict(comparison, margin=0.5, family=1, conditions="paper recipe, fp32")
    'Scratch-B is 0.50 points above fine-tuning (paper recipe, fp32) with one seed: no interval and no test.'
    """
    first, second = (network_label(arm).name for arm in (comparison.first, comparison.second))
    difference = comparison.difference
    if difference is not None and difference.mean < 0:
        # From here on, `first` is the arm that is ahead.
        first, second = second, first
    # str.capitalize would turn the rest into small letters: "Scratch-E".
    start, other = first[:1].upper() + first[1:], f"{second} ({conditions})"
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
    interval = f"[{low:.2f}, {high:.2f}], n = {n}"
    found = f"{points} {interval}"
    ahead = f"{first} has {points} more {interval}" if mean else f"their means are equal: {found}"
    equivalent = _reaches_level(comparison.p_equivalent_holm)
    # The permutation test assumes no distribution and the interval does, so they can disagree.
    if shown and low <= 0:
        uneven = "the interval does not: the differences are spread too unevenly to say more"
        return f"{pair}: {ahead}; the permutation test shows a difference (p = {comparison.p_holm:.2g}), {uneven}."
    if shown:
        within = f", a difference within the margin of {margin:g} points" if equivalent else ""
        return f"{start} is better than {other} by {found}{within}."
    if equivalent:
        return f"{pair} are equivalent within {margin:g} points: {ahead}."
    return (
        f"Undecided: {pair} are shown neither to differ nor to be equivalent within {margin:g} points: {ahead}{limit}."
    )


def _limit_of_seeds(comparison: ArmComparison, difference: Difference, family: int) -> str:
    """Return why no difference is shown, if the number of seeds or of comparisons has to do with it."""
    cannot = f"; {difference.n} seeds cannot show a difference"
    least = f"the smallest p they allow is {difference.p_floor:.2g}"
    # No n below six can reach 5 %: that says something about n, not about the arms.
    if not _reaches_level(difference.p_floor):
        return f"{cannot}: {least}"
    if not _reaches_level(comparison.p_holm_floor):
        return f"{cannot} among {family} comparisons: {least}, {comparison.p_holm_floor:.2g} after correction"
    # An interval without zero reads as a difference, and it is not corrected.
    if _reaches_level(difference.p) or (difference.interval and difference.interval[0] * difference.interval[1] > 0):
        corrected = f", {comparison.p_holm:.2g} after correction for {family} comparisons" if family > 1 else ""
        return f"; p = {difference.p:.2g}{corrected}, and {LEVEL:g} is needed"
    return ""


def _reaches_level(p: float | None) -> bool:
    return p is not None and p <= LEVEL
