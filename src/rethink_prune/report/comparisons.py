"""Which arms of a study are compared, seed by seed, and their p values corrected for a whole table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rethink_prune.report.networks import in_column_order, trains_pruned
from rethink_prune.report.records import RunRecord
from rethink_prune.report.statistics import Difference, holm, paired_difference


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


def compare_arms(runs: Sequence[RunRecord], *, margin: float) -> Iterator[ArmComparison]:
    """Yield every arm of the pruned network against fine-tuning; without that, against the first one.

    Parameters
    ----------
    runs
        One for each seed.
    margin
        Points within which arms count as equivalent.
    """
    # In the order of columns: the first one is fine-tuning, if any run has it.
    contenders = [network for network in planned_networks(runs) if trains_pruned(network)]
    for first in contenders[1:]:
        second = contenders[0]
        # All arms of a seed see the same images in the same order, so only differences within a seed count.
        pairs = [
            (run.study.seed, a.top1, b.top1)
            for run in runs
            if (a := run.arms.get(first)) is not None and (b := run.arms.get(second)) is not None
            if a.finished and b.finished and a.top1 is not None and b.top1 is not None
        ]
        difference = paired_difference([p[1] for p in pairs], [p[2] for p in pairs], margin=margin) if pairs else None
        yield ArmComparison(first, second, tuple(seed for seed, _, _ in pairs), difference)


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
