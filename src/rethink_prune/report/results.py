"""What a report says, computed once: documents and pictures only show it.

A report has a table for each data set, recipe and budget; a table has a row for each group of runs
(:mod:`rethink_prune.report.groups`); a row has its arms, their comparisons, and what the paper has for it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

from rethink_prune.report.aliases import other_names, under_one_name
from rethink_prune.report.budget_axis import BudgetCurve, arms_on_axis, budget_curves
from rethink_prune.report.comparisons import ArmComparison, compare_arms, correct_for_table, planned_networks, verdict
from rethink_prune.report.detection import DetectionTable, TransferRow, detection_tables
from rethink_prune.report.efficiency import EfficiencyCurves, efficiency_curves
from rethink_prune.report.groups import RunGroup
from rethink_prune.report.ledger import amortised_flops, arm_notation, shared_networks
from rethink_prune.report.networks import (
    PRUNED,
    RECALIBRATED,
    has_own_name,
    in_column_order,
    network_label,
    trains_pruned,
)
from rethink_prune.report.notes import ONE_PRETRAINED, PaperRow, paper_row, pretrained_networks, row_notes
from rethink_prune.report.patterns import KeptWidth, KernelPattern, LayerStage, row_pattern
from rethink_prune.report.records import RunRecord, StudyRecord, printable
from rethink_prune.report.remaining import (
    RoundOverSeeds,
    SizedRow,
    SizeSweep,
    kept_shares,
    mean_if_known,
    rounds_over_seeds,
    size_sweeps,
)
from rethink_prune.report.seed_curve import SeedCurve, curve_over_seeds
from rethink_prune.report.statistics import SeedStatistics, describe_seeds


@dataclass(frozen=True)
class ArmOverSeeds:
    """An arm over the seeds of a row; so are the unpruned network and the pruned one before any retraining.

    Attributes
    ----------
    top1, top1_best
        Percent after the last epoch, and of the best epoch on the test images.
    epochs, params, macs, train_flops, flops_before, train_flops_with_search
        Means over seeds; `flops_before` is what its ancestors' training took, `train_flops_with_search` all of it with
        the trainings that found the pruned network's widths.
    train_flops_amortised
        With its ancestors', each divided by the rows of the report that build on it; mean over seeds.
    notation
        ``S_N`` for the pruned architecture from scratch for N epochs, ``T_N`` for a ticket, ``P_K-R_N`` for a parent of
        K epochs, pruned and retrained for N; empty for others.
    curve
        Where every seed's is known.
    """

    arm: str
    top1: SeedStatistics | None
    top1_best: SeedStatistics | None = None
    epochs: float | None = None
    params: float | None = None
    macs: float | None = None
    train_flops: float | None = None
    flops_before: float | None = None
    train_flops_with_search: float | None = None
    train_flops_amortised: float | None = None
    notation: str = ""
    curve: SeedCurve | None = None

    @property
    def flops_total(self) -> float | None:
        """Training FLOPs with those of its ancestors."""
        if self.train_flops is None or self.flops_before is None:
            return None
        return self.train_flops + self.flops_before

    @property
    def search_flops(self) -> float:
        """Training FLOPs of what found the pruned network's widths, beyond its ancestors; 0 where nothing had to."""
        if self.train_flops_with_search is None or self.flops_total is None:
            return 0.0
        # Means over seeds: rounding may leave a little.
        search = self.train_flops_with_search - self.flops_total
        return search if search > 1e-9 * self.flops_total else 0.0


@dataclass(frozen=True)
class ResultRow:
    """One study over its seeds.

    Attributes
    ----------
    slug
        Its name in file names.
    pruned_by
        The pruner with its target and with what sets this row apart beside it.
    target
        What the pruner was told, such as ``("ratio", 0.5)``, where it is one number.
    sweep
        Equal for rows that differ in their target alone.
    best
        The arms of the pruned network with the highest mean, if there are two or more to choose from; of those that are
        not compared over lengths.
    macs_kept, params_kept
        Percent.
    widths, stages, kernels
        What pruning leaves, by layer and by layer stage, see :mod:`rethink_prune.report.patterns`.
    curves
        Retraining against training from scratch over lengths, where there are such arms.
    on_axis
        The arms that `curves` compare, which `comparisons` leave out.
    rounds
        Of a study that prunes in several.
    one_pretrained
        Whether all seeds start from one and the same pretrained network.
    """

    slug: str
    network: str
    pruner: str
    pruned_by: str
    target: tuple[str, float] | None
    sweep: str
    experiment: str | None
    seeds: tuple[int, ...]
    arms: tuple[ArmOverSeeds, ...]
    best: tuple[str, ...]
    macs_kept: SeedStatistics | None
    params_kept: SeedStatistics | None
    widths: tuple[KeptWidth, ...]
    stages: tuple[LayerStage, ...]
    kernels: tuple[KernelPattern, ...]
    comparisons: tuple[ArmComparison, ...]
    curves: tuple[BudgetCurve, ...]
    on_axis: tuple[str, ...]
    rounds: tuple[RoundOverSeeds, ...]
    paper: PaperRow | None
    one_pretrained: bool
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name of the row in a sentence."""
        return f"{self.network}, {self.pruned_by}"

    @property
    def verdicts(self) -> list[str]:
        """What all its comparisons show, a sentence or two each."""
        return [curve.verdict for curve in self.curves] + [comparison.verdict for comparison in self.comparisons]

    def arm(self, name: str) -> ArmOverSeeds | None:
        """Return the results of an arm, if the row has it."""
        return next((result for result in self.arms if result.arm == name), None)


@dataclass(frozen=True)
class ResultTable:
    """The rows of one data set, recipe and budget: the family that p values are corrected for.

    `sweeps` has the accuracies over what remains, where rows have tickets or rounds; `efficiency` the errors of methods
    over size, where there are two methods or more; `detection` what the networks are worth to a transfer, a table for
    each detection data set.
    """

    dataset: str
    recipe: str
    budget: str
    precision: str
    arms: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    sweeps: tuple[SizeSweep, ...]
    efficiency: tuple[EfficiencyCurves, ...]
    detection: tuple[DetectionTable, ...]

    @property
    def title(self) -> str:
        """Name of the table in a heading."""
        return f"{self.dataset}, {_conditions(self.recipe, self.budget, self.precision)}"


@dataclass(frozen=True)
class Report:
    """All tables.

    Attributes
    ----------
    margin
        Points within which arms count as equivalent.
    runs
        How many runs the tables rest on.
    problems
        What could not be used, in words.
    """

    tables: tuple[ResultTable, ...]
    margin: float
    runs: int
    problems: tuple[str, ...]


def compute_report(groups: Sequence[RunGroup], *, margin: float, problems: Iterable[str] = ()) -> Report:
    """Compute a report.

    Parameters
    ----------
    margin
        Points within which arms count as equivalent.
    problems
        What could not be used, in words.
    """
    families: dict[tuple[str, str, str], list[RunGroup]] = defaultdict(list)
    for group in groups:
        families[group.study.dataset, group.study.recipe, group.study.budget].append(group)
    numbers, shared = count(1), shared_networks([group.runs for group in groups])
    tables = [_result_table(members, margin, numbers, shared) for members in families.values()]
    return Report(tuple(tables), margin, sum(len(group.runs) for group in groups), tuple(map(printable, problems)))


def _result_table(
    groups: Sequence[RunGroup], margin: float, numbers: Iterator[int], shared: Mapping[str, int]
) -> ResultTable:
    """Return the table of groups with one data set, recipe and budget; its rows take the next numbers."""
    study = groups[0].study
    parts = [_compared(group, margin) for group in groups]
    corrected = correct_for_table([part.comparisons for part in parts])
    family = sum(comparison.tested is not None for row in corrected for comparison in row)
    rows = []
    for part, comparisons in zip(parts, corrected, strict=True):
        say = partial(verdict, margin=margin, family=family, conditions=_group_conditions(part.group))
        said = [replace(each, verdict=say(each)) for each in comparisons]
        rows.append(_result_row(replace(part, comparisons=said), next(numbers), shared))
    arms = in_column_order({result.arm for row in rows for result in row.arms if result.arm not in row.on_axis})
    precision = " or ".join(sorted({group.precision for group in groups} - {""}))
    sized = [
        SizedRow(row.sweep, row.pruned_by, part.group.runs, row.on_axis) for row, part in zip(rows, parts, strict=True)
    ]
    sweeps = tuple(size_sweeps(sized))
    conditions = _conditions(study.recipe, study.budget, precision)
    efficiency = efficiency_curves(sized, margin=margin, conditions=conditions)
    transferred = [
        TransferRow(row.slug, row.pruned_by, part.group.runs, row.one_pretrained)
        for row, part in zip(rows, parts, strict=True)
    ]
    return ResultTable(
        dataset=study.dataset,
        recipe=study.recipe,
        budget=study.budget,
        precision=precision,
        arms=tuple(arms),
        rows=tuple(rows),
        sweeps=sweeps,
        efficiency=efficiency,
        detection=detection_tables(transferred, margin=margin, conditions=conditions),
    )


@dataclass(frozen=True)
class _Compared:
    """A group, each training under one name, with its comparisons."""

    group: RunGroup
    comparisons: Sequence[ArmComparison]
    curves: tuple[BudgetCurve, ...]
    on_axis: tuple[str, ...]


def _compared(group: RunGroup, margin: float) -> _Compared:
    names = other_names(group.runs)
    # Typed names say which lengths belong together, so curves come first.
    curves = tuple(budget_curves(group.runs, margin=margin, conditions=_group_conditions(group)))
    on_axis = {names.get(arm, arm) for arm in arms_on_axis(group.runs, curves)}
    on_axis = {arm for arm in on_axis if not has_own_name(arm)}
    runs = under_one_name(group.runs, names)
    told = [
        f"{a} and {name} are one training: it counts once, as {network_label(name).title}" for a, name in names.items()
    ]
    comparisons = list(compare_arms(runs, margin=margin, apart=on_axis))
    group = replace(group, runs=tuple(runs), notes=(*group.notes, *told))
    return _Compared(group, comparisons, curves, tuple(in_column_order(on_axis)))


def _group_conditions(group: RunGroup) -> str:
    return _conditions(group.study.recipe, group.study.budget, group.precision)


def _conditions(recipe: str, budget: str, precision: str) -> str:
    return f"{recipe} recipe, {budget} budget" + (f", {precision}" if precision else "")


def _result_row(compared: _Compared, number: int, shared: Mapping[str, int]) -> ResultRow:
    group = compared.group
    runs, study = group.runs, group.study
    arms = [_with_ledger(arm_over_seeds(network, runs), runs, shared) for network in planned_networks(runs)]
    after_pruning = [run.pruned.top1 for run in runs if run.pruned is not None and run.pruned.top1 is not None]
    if after_pruning:
        arms.append(ArmOverSeeds(PRUNED, describe_seeds(after_pruning)))
    again = [v for run in runs if run.pruned is not None and (v := run.pruned.top1_recalibrated) is not None]
    if again:
        arms.append(ArmOverSeeds(RECALIBRATED, describe_seeds(again)))
    # As the table shows them: arms that look equal there are all the best.
    means = {r.arm: round(r.top1.mean, 2) for r in arms if r.top1 is not None and trains_pruned(r.arm)}
    means = {arm: mean for arm, mean in means.items() if arm not in compared.on_axis}
    # The paper prunes in one cut.
    paper = None if study.rounds else paper_row(group.experiment, study.target)
    pattern = row_pattern(group, number)
    seeds = tuple(run.study.seed for run in runs)
    costs = {result.arm: result for result in arms}
    comparisons, curves = [_with_search(each, costs) for each in compared.comparisons], compared.curves
    one_pretrained = len(set(seeds)) > 1 and len(pretrained_networks(runs)) == 1
    if one_pretrained:
        comparisons = [replace(each, verdict=f"{each.verdict} {ONE_PRETRAINED}") for each in comparisons]
        curves = tuple(replace(each, verdict=f"{each.verdict} {ONE_PRETRAINED}") for each in curves)
    return ResultRow(
        slug=group.slug(number),
        network=study.model,
        pruner=study.pruner,
        pruned_by=group.pruned_by,
        target=_one_number(study),
        sweep=", ".join([study.model, study.pruner, *group.settings]),
        experiment=group.experiment,
        seeds=seeds,
        arms=tuple(arms),
        best=tuple(arm for arm, mean in means.items() if len(means) > 1 and mean == max(means.values())),
        macs_kept=kept_shares([(run.pruned.macs, run.study.ledger.macs_reference) for run in runs if run.pruned]),
        params_kept=kept_shares([(run.pruned.params, run.params_unpruned) for run in runs if run.pruned]),
        widths=pattern.widths,
        stages=pattern.stages,
        kernels=pattern.kernels,
        comparisons=tuple(comparisons),
        curves=curves,
        on_axis=compared.on_axis,
        rounds=tuple(rounds_over_seeds(runs)),
        paper=paper,
        one_pretrained=one_pretrained,
        notes=(*group.notes, *row_notes(runs, paper), *([pattern.unknown] if pattern.unknown else [])),
    )


def _one_number(study: StudyRecord) -> tuple[str, float] | None:
    """Return the target where it is one number; in rounds, their number is another one."""
    if study.rounds:
        return None
    return next(((name, float(value)) for name, value in study.target.items() if isinstance(value, int | float)), None)


def _with_ledger(result: ArmOverSeeds, runs: Sequence[RunRecord], shared: Mapping[str, int]) -> ArmOverSeeds:
    """Add the amortised cost and the notation of an arm."""
    flops = mean_if_known([amortised_flops(run, result.arm, shared) for run in _done(result.arm, runs)])
    return replace(result, train_flops_amortised=flops, notation=arm_notation(result.arm, runs))


def _with_search(comparison: ArmComparison, costs: Mapping[str, ArmOverSeeds]) -> ArmComparison:
    """Add to a verdict what its arms cost where finding the pruned network's widths took trainings of its own."""
    pair = [costs[arm] for arm in (comparison.first, comparison.second) if arm in costs]
    if not any(arm.search_flops for arm in pair):
        return comparison
    told = [f"{network_label(a.arm).name} {a.train_flops_with_search:.3g}" for a in pair if a.train_flops_with_search]
    said = f"{comparison.verdict} FLOPs with the trainings that found the network's widths: {', '.join(told)}."
    return replace(comparison, verdict=said)


def arm_over_seeds(arm: str, runs: Sequence[RunRecord]) -> ArmOverSeeds:
    """Summarise an arm over the runs that finished it."""
    done = [run.trained[arm] for run in _done(arm, runs)]
    best = [entry.top1_best for entry in done if entry.top1_best is not None]
    costs = ("epochs", "params", "macs", "train_flops", "flops_before", "train_flops_with_search")
    means: dict[str, Any] = {cost: mean_if_known([getattr(entry, cost) for entry in done]) for cost in costs}
    return ArmOverSeeds(
        arm=arm,
        top1=describe_seeds([entry.top1 for entry in done if entry.top1 is not None]),
        # A mean over some of the seeds would not belong to the other numbers of the arm.
        top1_best=describe_seeds(best) if len(best) == len(done) else None,
        curve=curve_over_seeds(done),
        **means,
    )


def _done(arm: str, runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that finished an arm."""
    return [run for run in runs if (entry := run.trained.get(arm)) is not None and entry.finished]
