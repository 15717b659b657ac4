"""Parameter efficiency: which way of pruning finds the architectures that learn best from scratch at a given size.

A *method* is a pruner over the sizes of a sweep. Its curve is the error of one arm with fresh weights over parameters,
or over MACs. Methods of one network and data set, trained alike, are compared with uniform pruning at equal size.
Between a seed's sizes, accuracy is interpolated linearly in the logarithm of the size, never beyond them. What is
compared is its mean over the common range: one number a seed, so one test answers for the whole curve.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from rethink_prune.report.comparisons import ArmComparison, compare_pair, correct_for_table, verdict
from rethink_prune.report.networks import has_own_name, in_column_order, network_label
from rethink_prune.report.notes import ONE_PRETRAINED, pretrained_networks
from rethink_prune.report.records import RunRecord
from rethink_prune.report.remaining import SizedRow, alike, mean_if_known
from rethink_prune.report.statistics import SeedStatistics, describe_seeds
from rethink_prune.study.arms import known_arm

Measure = Literal["params", "macs"]

UNIFORM = "uniform"
# What is equal in a comparison, as tables and pictures call it.
MEASURES: Mapping[Measure, str] = {"params": "parameters", "macs": "MACs"}
# What a guided pruner is given changes with the size.
_ALSO_HOW_MUCH = {"pruner.sources", "pruner.size"}
# Drawn beside the arm that the paper's figures are about.
_PAPER_ARM = "scratch_e"
# By network and data set.
_FIGURES: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("paper_figures.yaml").read_text())
# Of one seed, by size: logarithms, and top-1 in percent.
_Line = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class EfficiencySize:
    """One size of a method.

    Attributes
    ----------
    params, macs
        Means over seeds.
    error
        Percent, after the last epoch.
    best, worst
        Error of the best and the worst seed.
    front
        The measures by which no size of any method is as small and has as low a mean error, or better in one.
    """

    network: str
    pruned_by: str
    params: float
    macs: float | None
    error: SeedStatistics
    best: float
    worst: float
    front: tuple[Measure, ...] = ()

    def measured(self, measure: Measure) -> float | None:
        """Return the mean number of parameters or of MACs."""
        return self.params if measure == "params" else self.macs


@dataclass(frozen=True)
class MethodCurve:
    """The sizes of one method, small ones first."""

    method: str
    sizes: tuple[EfficiencySize, ...]


@dataclass(frozen=True)
class MatchedComparison:
    """A method against uniform pruning at equal size.

    Attributes
    ----------
    pruned_by
        The method.
    smallest, largest
        The sizes that all compared seeds have of both; None where there are none.
    gap_smallest, gap_largest
        Points of top-1 there, means over seeds.
    comparison
        Of top-1, averaged over the logarithm of the size.
    verdict
        What it shows, or why it shows nothing.
    """

    network: str
    pruned_by: str
    measure: Measure
    smallest: int | None
    largest: int | None
    gap_smallest: float | None
    gap_largest: float | None
    comparison: ArmComparison
    verdict: str = ""


@dataclass(frozen=True)
class PaperCurve:
    """A method in a figure of the paper, read from the figure: `points` are parameters and errors in percent."""

    method: str
    figure: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class EfficiencyCurves:
    """The methods of one network by one arm.

    Attributes
    ----------
    title
        With the settings that other curves of the network do not share.
    uncompared
        Methods with no uniform counterpart.
    paper
        To draw beside them; nothing is computed from it.
    """

    title: str
    network: str
    arm: str
    methods: tuple[MethodCurve, ...]
    matched: tuple[MatchedComparison, ...]
    uncompared: tuple[str, ...]
    paper: tuple[PaperCurve, ...]

    @property
    def verdicts(self) -> list[str]:
        """What the comparisons show, a few sentences each."""
        said = [each.verdict for each in self.matched]
        if self.uncompared:
            why = "no uniform pruning of the same layers has two sizes or more (pruner=uniform)"
            said.append(f"No verdict on {', '.join(self.uncompared)} at equal size: {why}.")
        return said


@dataclass(frozen=True)
class _Method:
    """A method by one arm, with its runs."""

    name: str
    rows: Sequence[SizedRow]
    curve: MethodCurve
    lines: Mapping[Measure, Mapping[int, _Line]]

    @property
    def uniform(self) -> bool:
        return self.rows[0].runs[0].study.pruner == UNIFORM

    @property
    def runs(self) -> list[RunRecord]:
        return [run for row in self.rows for run in row.runs]

    @property
    def one_pretrained(self) -> bool:
        return len({run.study.seed for run in self.runs}) > 1 and len(pretrained_networks(self.runs)) == 1


def efficiency_curves(rows: Sequence[SizedRow], *, margin: float, conditions: str) -> tuple[EfficiencyCurves, ...]:
    """Return the curves of a table, with their verdicts; none without two methods of two sizes each.

    Parameters
    ----------
    rows
        Of one data set, recipe and budget.
    margin
        Points within which methods count as equivalent.
    conditions
        What all rows have in common.
    """
    found = [curves for title, members in _comparable(rows) for curves in _by_arm(title, members, margin)]
    corrected = correct_for_table([[each.comparison for each in curves.matched] for curves in found])
    family = sum(comparison.tested is not None for its in corrected for comparison in its)
    said = []
    for curves, comparisons in zip(found, corrected, strict=True):
        pairs = zip(curves.matched, comparisons, strict=True)
        matched = [replace(each, comparison=comparison) for each, comparison in pairs]
        told = [_with_verdict(each, curves.arm, margin, family, conditions) for each in matched]
        said.append(replace(curves, matched=tuple(told)))
    return tuple(said)


def _comparable(rows: Sequence[SizedRow]) -> Iterator[tuple[str, list[tuple[str, list[SizedRow]]]]]:
    """Yield the rows of each network that was trained alike, by method, with a title."""
    networks: dict[str, list[SizedRow]] = defaultdict(list)
    for row in rows:
        networks[row.runs[0].study.model].append(row)
    for network, members in networks.items():
        settings = [_settings_of_method(row, of_pruner=False) for row in members]
        for apart, numbers in alike(settings):
            yield ", ".join([network, *apart]), list(_methods([members[number] for number in numbers]))


def _methods(rows: Sequence[SizedRow]) -> Iterator[tuple[str, list[SizedRow]]]:
    """Yield the rows of each method, with its name."""
    pruners: dict[str, list[SizedRow]] = defaultdict(list)
    for row in rows:
        study = row.runs[0].study
        pruners[f"{study.pruner} in rounds" if study.rounds else study.pruner].append(row)
    for name, members in pruners.items():
        for apart, numbers in alike([_settings_of_method(row, of_pruner=True) for row in members]):
            yield ", ".join([name, *apart]), [members[number] for number in numbers]


def _settings_of_method(row: SizedRow, *, of_pruner: bool) -> dict[str, str]:
    """Return the settings of a row without what says how much goes: the pruner's, or all others."""
    found = {name: value for name, value in row.settings.items() if name not in _ALSO_HOW_MUCH}
    chosen = {name: value for name, value in found.items() if name.startswith("pruner.") == of_pruner}
    guided = any("sources" in ((run.study.settings or {}).get("pruner") or {}) for run in row.runs)
    if of_pruner and guided and row.runs[0].study.experiment:
        # Sources change with the size too, so they cannot tell transferred patterns from others.
        chosen["experiment"] = row.runs[0].study.experiment
    return chosen


def _by_arm(title: str, methods: Sequence[tuple[str, list[SizedRow]]], margin: float) -> Iterator[EfficiencyCurves]:
    arms = {arm for _, rows in methods for row in rows for run in row.runs for arm in run.arms}
    for arm in in_column_order(arms):
        entry = known_arm(arm)
        if entry is None or entry.weights != "fresh" or not has_own_name(arm):
            continue
        sized = [method for name, rows in methods if (method := _method(name, rows, arm)) is not None]
        if len(sized) > 1:
            yield _curves(title, arm, sized, margin)


def _method(name: str, rows: Sequence[SizedRow], arm: str) -> _Method | None:
    """Return a method by one arm; None with less than two sizes."""
    sizes = sorted((size for row in rows if (size := _size_over_seeds(row, arm))), key=lambda size: size.params)
    if len({size.params for size in sizes}) < 2:
        return None
    lines: dict[Measure, dict[int, _Line]] = {}
    for measure in MEASURES:
        points: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in (run for row in rows for run in row.runs):
            entry = run.arms.get(arm)
            if entry is not None and entry.finished and (place := getattr(entry, measure)):
                points[run.study.seed][place].append(entry.top1 or 0.0)
        lines[measure] = {seed: _line_of_seed(its) for seed, its in points.items() if len(its) > 1}
    return _Method(name, rows, MethodCurve(name, tuple(sizes)), lines)


def _line_of_seed(points: Mapping[int, Sequence[float]]) -> _Line:
    """Return the sizes of a seed as logarithms, growing, with the mean top-1 of those that are equal."""
    places = sorted(points)
    return np.log(np.array(places, dtype=float)), np.array([np.mean(points[place]) for place in places])


def _size_over_seeds(row: SizedRow, arm: str) -> EfficiencySize | None:
    entries = [run.arms[arm] for run in row.runs if arm in run.arms and run.arms[arm].finished]
    params, macs = (mean_if_known([getattr(entry, measure) for entry in entries]) for measure in MEASURES)
    errors = [100 - entry.top1 for entry in entries if entry.top1 is not None]
    error = describe_seeds(errors)
    if not params or error is None:
        return None
    network = row.runs[0].study.model
    return EfficiencySize(network, row.pruned_by, params, macs or None, error, min(errors), max(errors))


def _curves(title: str, arm: str, methods: Sequence[_Method], margin: float) -> EfficiencyCurves:
    matched, uncompared = [], []
    for method in methods:
        if method.uniform:
            continue
        rivals = [other for other in methods if other.uniform and _same_units(method.runs, other.runs)]
        if not rivals:
            uncompared.append(method.name)
        for rival in rivals:
            for measure in MEASURES:
                if method.lines[measure] or rival.lines[measure]:
                    matched.append(_matched(method, rival, measure, margin))
    study = methods[0].rows[0].runs[0].study
    paper = _paper_curves(f"{study.model} {study.dataset}", methods) if arm == _PAPER_ARM else ()
    curves = tuple(_with_front([method.curve for method in methods]))
    return EfficiencyCurves(
        f"{title}, {network_label(arm).title}", study.model, arm, curves, tuple(matched), tuple(uncompared), paper
    )


def _same_units(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> bool:
    """Tell whether two methods take the same things away, channels or single weights, as far as layers tell."""
    ours, theirs = (
        {(layer.layer, layer.full) for run in runs if run.pruned for layer in run.pruned.layers}
        for runs in (first, second)
    )
    names = {name for name, _ in ours} & {name for name, _ in theirs}
    return all({full for layer, full in ours if layer == n} == {f for layer, f in theirs if layer == n} for n in names)


def _matched(method: _Method, rival: _Method, measure: Measure, margin: float) -> MatchedComparison:
    ours, theirs = method.lines[measure], rival.lines[measure]
    both = sorted(ours.keys() & theirs.keys())
    ranges = {seed: common_range(ours[seed][0], theirs[seed][0]) for seed in both}
    seeds = [seed for seed in both if ranges[seed] is not None]
    found = [place for seed in seeds if (place := ranges[seed])]
    # One range for all seeds: each of them answers the same question.
    low, high = max((a for a, _ in found), default=np.inf), min((b for _, b in found), default=-np.inf)
    if low > high:
        seeds = []
    means = [[mean_top1(lines[seed], low, high) for seed in seeds] for lines in (ours, theirs)]

    def gap(size: float) -> float | None:
        gaps = [np.interp(size, *ours[seed]) - np.interp(size, *theirs[seed]) for seed in seeds]
        return float(np.mean(gaps)) if gaps else None

    result = MatchedComparison(
        method.curve.sizes[0].network,
        method.name,
        measure,
        # Whole numbers: the ends are sizes of some seed.
        round(np.exp(low)) if seeds else None,
        round(np.exp(high)) if seeds else None,
        gap(low),
        gap(high),
        compare_pair(method.name, rival.name, seeds, *means, margin=margin),
    )
    words = []
    if not both:
        words.append(f"no seed has two sizes or more of both {method.name} and {rival.name}")
    elif not seeds:
        spans = [f"{name} has {_span(lines, both)}" for name, lines in ((method.name, ours), (rival.name, theirs))]
        words.append(f"their sizes do not overlap: {', '.join(spans)}")
    else:
        if left := sorted((ours.keys() | theirs.keys()) - {*seeds}):
            words.append(f"Left out, without sizes of both to compare: seeds {', '.join(map(str, left))}.")
        if method.one_pretrained or rival.one_pretrained:
            words.append(ONE_PRETRAINED)
    return replace(result, verdict=" ".join(words))


def common_range(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the range that lies within both of two ranges of growing numbers; None if there is none.

    Examples
    --------
    >>> common_range(np.array([1.0, 3.0]), np.array([2.0, 5.0])), common_range(np.array([1.0]), np.array([2.0]))
    ((2.0, 3.0), None)
    """
    low, high = max(float(first[0]), float(second[0])), min(float(first[-1]), float(second[-1]))
    return (low, high) if low <= high else None


def mean_top1(line: _Line, low: float, high: float) -> float:
    """Return the mean of what is linear between places, from `low` to `high`; both lie within the places.

    Examples
    --------
    >>> line = np.array([0.0, 1.0, 3.0]), np.array([90.0, 92.0, 92.0])
    >>> mean_top1(line, 0.0, 2.0), mean_top1(line, 0.5, 0.5)
    (91.5, 91.0)
    """
    places, top1 = line
    inside = places[(places > low) & (places < high)]
    at = np.array([low, *inside, high])
    values = np.interp(at, places, top1)
    return float(np.trapezoid(values, at) / (high - low)) if high > low else float(values[0])


def _span(lines: Mapping[int, _Line], seeds: Sequence[int]) -> str:
    ends = [(lines[seed][0][0], lines[seed][0][-1]) for seed in seeds]
    return f"{size_text(np.exp(min(a for a, _ in ends)))} to {size_text(np.exp(max(b for _, b in ends)))}"


def size_text(count: float) -> str:
    """Return a number of parameters or MACs in words.

    Examples
    --------
    >>> size_text(1500), size_text(853_018), size_text(11_620_000), size_text(4_089_184_256)
    ('1,500', '0.853 M', '11.6 M', '4.09 G')
    """
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e6:.3g} M" if count < 999.5e6 else f"{count / 1e9:.3g} G"


def _with_verdict(
    matched: MatchedComparison, arm: str, margin: float, family: int, conditions: str
) -> MatchedComparison:
    """Say what a comparison with corrected p values shows; its words so far say what is to be known of it."""
    equal, comparison = f"At equal {MEASURES[matched.measure]}", matched.comparison
    told, trained = matched.verdict, f"{network_label(arm).title}, {conditions}"
    if comparison.difference is None or matched.smallest is None or matched.largest is None:
        first, second = comparison.first, comparison.second
        return replace(matched, verdict=f"{equal}, {first} and {second} ({trained}) cannot be compared: {told}.")
    span = f"averaged over {size_text(matched.smallest)} to {size_text(matched.largest)}"
    said = verdict(comparison, margin=margin, family=family, conditions=trained)
    small, large = matched.gap_smallest or 0.0, matched.gap_largest or 0.0
    ends = (
        f"The mean difference, {comparison.first} minus {comparison.second}, is {small:+.2f} points at the smallest "
        f"size and {large:+.2f} at the largest"
    )
    # Opposite gaps cancel out: even equivalence would then say little about any one size.
    crossing = (
        ": the curves cross, so it depends on the size" if small * large < 0 and abs(small - large) > margin else ""
    )
    return replace(matched, verdict=" ".join([f"{equal}, {span}: {said} {ends}{crossing}.", *([told] if told else [])]))


def _with_front(curves: Sequence[MethodCurve]) -> Iterator[MethodCurve]:
    """Yield the curves with the sizes marked that are on the Pareto front of means."""
    sizes = [size for curve in curves for size in curve.sizes]

    def on_front(size: EfficiencySize, measure: Measure) -> bool:
        own = size.measured(measure)
        if own is None:
            return False
        here = (own, size.error.mean)
        places = [(place, other.error.mean) for other in sizes if (place := other.measured(measure)) is not None]
        return not any(there != here and there[0] <= here[0] and there[1] <= here[1] for there in places)

    for curve in curves:
        marked = [replace(s, front=tuple(m for m in MEASURES if on_front(s, m))) for s in curve.sizes]
        yield replace(curve, sizes=tuple(marked))


def _paper_curves(study: str, methods: Sequence[_Method]) -> tuple[PaperCurve, ...]:
    """Return the lines of the panels that show one of the methods' pruners; of all panels if none does."""
    panels, pruners = _FIGURES.get(study, []), {run.study.pruner for method in methods for run in method.runs}
    chosen = [panel for panel in panels if panel["automatic"] in pruners] or panels
    return tuple(
        PaperCurve(name, panel["figure"], tuple((1e6 * params, error) for params, error in points))
        for panel in chosen
        for name, points in panel["lines"].items()
    )
