"""The gap between inherited and fresh weights over the length of training, and where it closes.

A point is the difference of two arms over the seeds that have both, as :mod:`rethink_prune.report.comparisons` has it.
A curve has a point for each length of one comparison: at equal training, or at equal computation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rethink_prune.report.comparisons import ArmComparison, compare_pair, correct_for_table, planned_networks, verdict
from rethink_prune.report.crossover import Crossover, Place, find_crossover
from rethink_prune.report.networks import has_own_name, split_name
from rethink_prune.report.records import RunRecord
from rethink_prune.report.statistics import LEVEL

Question = Literal["training", "total"]

# What is equal in each, as tables and pictures call it.
QUESTIONS: dict[Question, str] = {"training": "equal training", "total": "equal total computation"}
# What families of arms are compared, by the end of their names.
_KINDS = {"": "", "_kd": ", with a teacher"}


@dataclass(frozen=True)
class BudgetPoint:
    """Retraining of one length against its counterpart from scratch.

    Attributes
    ----------
    epochs
        Of retraining, mean over seeds.
    scratch_epochs
        Of training from scratch, likewise.
    top1, scratch_top1
        Percent, means over the seeds that have both.
    comparison
        Retraining minus from scratch; its p values are corrected for the lengths of its curve.
    """

    epochs: float
    scratch_epochs: float
    top1: float
    scratch_top1: float
    comparison: ArmComparison

    @property
    def clear(self) -> bool:
        """Whether the interval at this length excludes zero."""
        difference = self.comparison.difference
        interval = difference.interval if difference else None
        return interval is not None and interval[0] * interval[1] > 0

    @property
    def survives(self) -> bool:
        """Whether a difference is shown after correction for all lengths of the curve."""
        return self.comparison.p_holm is not None and self.comparison.p_holm <= LEVEL

    @property
    def equivalent(self) -> bool:
        """Whether the two are shown to be equivalent after the same correction."""
        return self.comparison.p_equivalent_holm is not None and self.comparison.p_equivalent_holm <= LEVEL


@dataclass(frozen=True)
class BudgetCurve:
    """The gap of retraining over training from scratch at several lengths.

    Attributes
    ----------
    question
        What is equal: ``training`` has the same number of epochs, ``total`` the same computation, with the large
        network's for retraining.
    kind
        The end of its arms' names: ``_kd`` for those with a teacher.
    points
        By length.
    crossover
        None with one length.
    verdict
        What the curve shows, in words.
    """

    question: Question
    kind: str
    points: tuple[BudgetPoint, ...]
    crossover: Crossover | None
    verdict: str = ""

    @property
    def title(self) -> str:
        """Name of the comparison in tables and pictures."""
        return QUESTIONS[self.question] + _KINDS[self.kind]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that have a point."""
        return tuple(sorted({seed for point in self.points for seed in point.comparison.seeds}))


def budget_curves(runs: Sequence[RunRecord], *, margin: float, conditions: str) -> Iterator[BudgetCurve]:
    """Yield the curves of a group, with their verdicts; none where no length has both arms.

    Parameters
    ----------
    runs
        One for each seed.
    margin
        Points within which arms count as equivalent.
    conditions
        What all arms have in common: recipe, budget rule and precision.
    """
    for kind in _KINDS:
        for question in QUESTIONS:
            found: dict[float, tuple[BudgetPoint, dict[int, float]]] = {}
            for arm in planned_networks(runs):
                if split_name(arm)[0] == f"retrain{kind}" and (point := _point(arm, question, runs, margin)):
                    # Two names of one length are one point: the name counts that more seeds have.
                    known = found.get(point[0].epochs)
                    if known is None or len(point[1]) > len(known[1]):
                        found[point[0].epochs] = point
            if found:
                yield _curve(question, kind, [found[epochs] for epochs in sorted(found)], margin, conditions)


def arms_on_axis(runs: Sequence[RunRecord], curves: Sequence[BudgetCurve]) -> set[str]:
    """Return the arms that are compared over lengths alone, by their typed names.

    Where there are curves, the arms of their families that no run has finished yet belong to them too.
    """
    pairs = (point.comparison for curve in curves for point in curve.points)
    compared = {arm for pair in pairs for arm in (pair.first, pair.second)}
    families = {split_name(arm)[0] for arm in compared}
    for arm in planned_networks(runs):
        if split_name(arm)[0] in families and not any(run.arms[arm].finished for run in runs if arm in run.arms):
            compared.add(arm)
    return {arm for arm in compared if not has_own_name(arm)}


def _point(
    arm: str, question: Question, runs: Sequence[RunRecord], margin: float
) -> tuple[BudgetPoint, dict[int, float]] | None:
    """Return the point of a retraining arm, and each run's gap by its number; None if no run has both arms."""
    rivals = {number: rival for number, run in enumerate(runs) if (rival := _rival(arm, question, run))}
    if not rivals:
        return None
    pairs = {number: (runs[number].arms[arm], runs[number].arms[rival]) for number, rival in rivals.items()}
    seeds = tuple(runs[number].study.seed for number in pairs)
    first, second = ([pair[side].top1 or 0.0 for pair in pairs.values()] for side in (0, 1))
    lengths = [float(np.mean([pair[side].epochs or 0 for pair in pairs.values()])) for side in (0, 1)]
    comparison = compare_pair(arm, next(iter(rivals.values())), seeds, first, second, margin=margin)
    # Rounded as there: accuracies are shares of whole images.
    gaps = dict(zip(pairs, np.round(np.subtract(first, second), 9).tolist(), strict=True))
    point = BudgetPoint(lengths[0], lengths[1], float(np.mean(first)), float(np.mean(second)), comparison)
    return point, gaps


def _rival(arm: str, question: Question, run: RunRecord) -> str | None:
    """Return the finished arm from scratch that one of retraining is compared with, if a run has both."""
    entry = run.arms.get(arm)
    if entry is None or not entry.finished or not entry.epochs:
        return None
    family, length = split_name(arm)
    family = family.replace("retrain", "scratch")
    if question == "total":
        names = [name for name in run.arms if split_name(name) == (family, f"total:{length}")]
    else:
        names = [name for name in run.arms if split_name(name)[0] == family and run.arms[name].epochs == entry.epochs]
        # Of several names of one training, the one that was typed alike.
        names.sort(key=lambda name: split_name(name)[1] != length)
    return next((name for name in names if run.arms[name].finished), None)


def _curve(
    question: Question, kind: str, found: Sequence[tuple[BudgetPoint, dict[int, float]]], margin: float, conditions: str
) -> BudgetCurve:
    (corrected,) = correct_for_table([[point.comparison for point, _ in found]])
    points = [replace(point, comparison=c) for (point, _), c in zip(found, corrected, strict=True)]
    crossover = None
    if len(points) > 1:
        numbers = sorted({number for _, gaps in found for number in gaps})
        gaps = [[gaps.get(number, np.nan) for _, gaps in found] for number in numbers]
        crossover = find_crossover([point.epochs for point in points], gaps)
    curve = BudgetCurve(question, kind, tuple(points), crossover)
    return replace(curve, verdict=curve_verdict(curve, margin=margin, conditions=conditions))


def curve_verdict(curve: BudgetCurve, *, margin: float, conditions: str) -> str:
    """Say where the gap closes and which gaps are shown, in words that need no manual.

    Parameters
    ----------
    curve
        With corrected p values.
    margin
        Points within which two arms count as equivalent.
    conditions
        What all arms have in common: recipe, budget rule and precision.
    """
    equal = f"At {curve.title} ({conditions})"
    if curve.crossover is None:
        point = curve.points[0]
        said = verdict(point.comparison, margin=margin, family=1, conditions=conditions)
        return f"{equal}, for the only length of retraining, {_epochs(point.epochs)}: {said}"
    return f"{equal}, {_crossover_text(curve, curve.crossover)}. {_lengths_text(curve, margin)}"


def _crossover_text(curve: BudgetCurve, crossover: Crossover) -> str:
    shortest, longest = f"{crossover.shortest:.3g}", f"{crossover.longest:.3g}"
    n, trained = len(curve.seeds), "training" if curve.question == "training" else "retraining"
    interval = "one seed: no interval"
    if crossover.interval is not None:
        low, high = crossover.interval
        interval = f"95 % interval {_interval_text(low, high, shortest, longest)}, {n} seeds"
        # Where the gap is clear at the end that the crossover lies beyond, a length where it is not says no more.
        outermost = {"below": curve.points[0], "beyond": curve.points[-1]}.get(str(crossover.place))
        if (low, high) == ("below", "beyond") and not (outermost and outermost.clear):
            return (
                f"it cannot be told where training from scratch catches up: within {shortest} to {longest} epochs of "
                f"{trained}, before, or after ({interval})"
            )
    if crossover.place == "beyond":
        said = f"training from scratch does not catch up within {shortest} to {longest} epochs of {trained}"
    elif crossover.place == "below":
        said = (
            f"retraining has no head start: training from scratch is level or ahead within {shortest} to {longest} "
            f"epochs of {trained}"
        )
    else:
        said = f"training from scratch catches up after about {_epochs(crossover.place)} of {trained}"
    return f"{said} ({interval})"


def _interval_text(low: Place, high: Place, shortest: str, longest: str) -> str:
    """Return an interval of lengths in words.

    Examples
    --------
    >>> _interval_text(4.1, 9.8, "1", "40"), _interval_text("below", 2.25, "1", "40")
    ('4.1 to 9.8', 'below 1 to 2.2')
    >>> _interval_text("beyond", "beyond", "1", "40")
    'beyond 40'
    """
    ends = dict.fromkeys(place_text(end, shortest, longest) for end in (low, high))
    return " to ".join(ends)


def place_text(place: Place, shortest: str, longest: str) -> str:
    """Return a length in epochs, or that it lies outside those that were run.

    Examples
    --------
    >>> place_text(6.349, "1", "40"), place_text("below", "1", "40"), place_text("beyond", "1", "40")
    ('6.3', 'below 1', 'beyond 40')
    """
    if isinstance(place, str):
        return f"{place} {shortest if place == 'below' else longest}"
    return f"{place:.1f}" if place < 100 else f"{place:.0f}"


def _lengths_text(curve: BudgetCurve, margin: float) -> str:
    """Say at which lengths a gap or equivalence is shown after correction for all lengths."""
    shown = {
        "retraining is better": [p for p in curve.points if p.survives and p.top1 > p.scratch_top1],
        "from scratch is better": [p for p in curve.points if p.survives and p.top1 < p.scratch_top1],
        f"the two are equivalent within {margin:g} points": [p for p in curve.points if p.equivalent],
    }
    parts = [f"{what} at {_listed_epochs(points)}" for what, points in shown.items() if points]
    tested = [point for point in curve.points if point.comparison.tested is not None]
    if parts:
        return f"Shown after correction for {len(tested)} lengths: {'; '.join(parts)}."
    if not tested:
        return "One seed: no test."
    said = f"At no single length is a difference or equivalence shown after correction for {len(tested)} lengths"
    best = max(tested, key=lambda point: len(point.comparison.seeds)).comparison
    if best.difference is not None and best.p_holm_floor is not None and best.p_holm_floor > LEVEL:
        least = f"{best.difference.p_floor:.2g}, {best.p_holm_floor:.2g} after correction"
        return f"{said}; {best.difference.n} seeds cannot show a difference: the smallest p they allow is {least}."
    return f"{said}."


def _listed_epochs(points: Sequence[BudgetPoint]) -> str:
    *most, last = [f"{point.epochs:.3g}" for point in points]
    return f"{', '.join(most)} and {last} epochs" if most else _epochs(float(last))


def _epochs(number: float) -> str:
    """Return a number of epochs in words.

    Examples
    --------
    >>> _epochs(1), _epochs(6.349)
    ('1 epoch', '6.3 epochs')
    """
    text = f"{number:.1f}".removesuffix(".0") if number < 100 else f"{number:.0f}"
    return f"{text} {'epoch' if text == '1' else 'epochs'}"
