"""What a report says, computed once: documents and pictures only show it.

A report has a table for each data set, recipe and budget; a table has a row for each group of runs
(:mod:`rethink_prune.report.groups`); a row has its arms, their comparisons, and what the paper has for it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from rethink_prune.report.arm_results import ArmOverSeeds, arm_over_seeds
from rethink_prune.report.comparisons import ArmComparison, compare_arms, correct_for_table, planned_networks
from rethink_prune.report.groups import RunGroup
from rethink_prune.report.networks import PRUNED, in_column_order, trains_pruned
from rethink_prune.report.notes import pretrained_networks, row_notes
from rethink_prune.report.paper import PaperRow, paper_row
from rethink_prune.report.records import RunRecord, printable
from rethink_prune.report.statistics import SeedStatistics, describe_seeds
from rethink_prune.report.verdicts import verdict

ONE_PRETRAINED = "All seeds share one pretrained network: what training another would change is left out."


@dataclass(frozen=True)
class KeptWidth:
    """A layer's width: in full, and the mean of what is kept."""

    layer: str
    kept: float
    full: int


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
        The arms of the pruned network with the highest mean, if there are two or more to choose from.
    macs_kept, params_kept
        Percent.
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
    comparisons: tuple[ArmComparison, ...]
    paper: PaperRow | None
    one_pretrained: bool
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name of the row in a sentence."""
        return f"{self.network}, {self.pruned_by}"

    def arm(self, name: str) -> ArmOverSeeds | None:
        """Return the results of an arm, if the row has it."""
        return next((result for result in self.arms if result.arm == name), None)


@dataclass(frozen=True)
class ResultTable:
    """The rows of one data set, recipe and budget: the family that p values are corrected for."""

    dataset: str
    recipe: str
    budget: str
    arms: tuple[str, ...]
    rows: tuple[ResultRow, ...]

    @property
    def title(self) -> str:
        """Name of the table in a heading."""
        return f"{self.dataset}, {self.recipe} recipe, {self.budget} budget"


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
    numbers = count(1)
    tables = [_result_table(members, margin, numbers) for members in families.values()]
    return Report(tuple(tables), margin, sum(len(group.runs) for group in groups), tuple(map(printable, problems)))


def _result_table(groups: Sequence[RunGroup], margin: float, numbers: Iterator[int]) -> ResultTable:
    """Return the table of groups with one data set, recipe and budget; its rows take the next numbers."""
    study = groups[0].study
    compared = correct_for_table([list(compare_arms(group.runs, margin=margin)) for group in groups])
    family = sum(comparison.tested is not None for row in compared for comparison in row)
    say = partial(verdict, margin=margin, family=family, recipe=study.recipe, budget=study.budget)
    rows = [
        _result_row(group, next(numbers), [replace(comparison, verdict=say(comparison)) for comparison in comparisons])
        for group, comparisons in zip(groups, compared, strict=True)
    ]
    arms = in_column_order({result.arm for row in rows for result in row.arms})
    return ResultTable(study.dataset, study.recipe, study.budget, tuple(arms), tuple(rows))


def _result_row(group: RunGroup, number: int, comparisons: Iterable[ArmComparison]) -> ResultRow:
    runs, study = group.runs, group.study
    arms = [arm_over_seeds(network, runs) for network in planned_networks(runs)]
    after_pruning = [run.pruned.top1 for run in runs if run.pruned is not None and run.pruned.top1 is not None]
    if after_pruning:
        arms.append(ArmOverSeeds(PRUNED, describe_seeds(after_pruning)))
    # As the table shows them: arms that look equal there are all the best.
    means = {r.arm: round(r.top1.mean, 2) for r in arms if r.top1 is not None and trains_pruned(r.arm)}
    # A value can be the hash of a file, too long for a table.
    settings = [f"{name} {value[:20]}" for name, value in group.by]
    pruned_by = ", ".join([f"{study.pruner} {study.target_text}", *settings])
    paper = paper_row(group.experiment, study.target)
    seeds = tuple(run.study.seed for run in runs)
    one_pretrained = len(set(seeds)) > 1 and len(pretrained_networks(runs)) == 1
    if one_pretrained:
        comparisons = [replace(each, verdict=f"{each.verdict} {ONE_PRETRAINED}") for each in comparisons]
    return ResultRow(
        # The number keeps rows apart whose names differ only in what file names leave out.
        slug=f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', f'{study.model} {pruned_by}'.lower()).strip('-')[:60]}",
        network=study.model,
        pruner=study.pruner,
        pruned_by=pruned_by,
        target=next(((n, float(value)) for n, value in study.target.items() if isinstance(value, int | float)), None),
        sweep=", ".join([study.model, study.pruner, *settings]),
        experiment=group.experiment,
        seeds=seeds,
        arms=tuple(arms),
        best=tuple(arm for arm, mean in means.items() if len(means) > 1 and mean == max(means.values())),
        macs_kept=_kept_shares([(run.pruned.macs, run.study.ledger.macs_reference) for run in runs if run.pruned]),
        params_kept=_kept_shares([(run.pruned.params, run.large.params) for run in runs if run.pruned and run.large]),
        widths=tuple(_mean_widths(runs)),
        comparisons=tuple(comparisons),
        paper=paper,
        one_pretrained=one_pretrained,
        notes=(*group.notes, *row_notes(runs, paper)),
    )


def _kept_shares(parts: Sequence[tuple[float | None, float | None]]) -> SeedStatistics | None:
    """Return the share in percent of each part in its whole, over the seeds where both are known."""
    return describe_seeds([100 * part / whole for part, whole in parts if part is not None and whole])


def _mean_widths(runs: Sequence[RunRecord]) -> Iterable[KeptWidth]:
    # By the full width as well: mixed runs can have a layer of one name in two sizes.
    kept: dict[tuple[str, int], list[int]] = defaultdict(list)
    for run in runs:
        for layer in run.pruned.layers if run.pruned else ():
            kept[layer.layer, layer.full].append(layer.kept)
    for (name, full), widths in kept.items():
        yield KeptWidth(name, float(np.mean(widths)), full)
