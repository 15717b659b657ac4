"""What a report says, worked out once: tables, pictures and the page only show it.

A report has a table for each data set, recipe and budget; a table has a row for each group of runs
(:mod:`rethink_prune.report.groups`); a row has its arms, their comparisons, and what the paper has for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rethink_prune.report.groups import Group
from rethink_prune.report.paper import PaperRow, paper_row
from rethink_prune.report.runs import Layer, Run, Trained, printable
from rethink_prune.report.statistics import Difference, Sample, holm, paired_difference, sample
from rethink_prune.report.verdicts import NAMES, verdict
from rethink_prune.study.arms import ARMS

# The columns of a table, in their order; other arms come after those of the paper.
PAPER_ARMS = ("large", "finetune", "scratch_e", "scratch_b")
PRUNED = "pruned"


@dataclass(frozen=True)
class Curve:
    """Top-1 during training: the mean over seeds, and the lowest and highest seed.

    Seeds that trained for different numbers of epochs are matched by the share of their training that is done; the
    positions are means too. `flops` counts the ancestors' training, and is None where that is not known.
    """

    epoch: tuple[float, ...]
    flops: tuple[float, ...] | None
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class ArmResult:
    """An arm over the seeds of a row; so are the unpruned network and the pruned one before any retraining.

    Attributes
    ----------
    arm : str
    top1, top1_best : Sample or None
        Percent after the last epoch, and of the best epoch on the test images.
    epochs, params, macs, train_flops, flops_before : float or None
        Means over seeds; `flops_before` is what its ancestors' training took.
    curve : Curve or None
        Where every seed's is known.
    """

    arm: str
    top1: Sample | None
    top1_best: Sample | None = None
    epochs: float | None = None
    params: float | None = None
    macs: float | None = None
    train_flops: float | None = None
    flops_before: float | None = None
    curve: Curve | None = None


@dataclass(frozen=True)
class Comparison:
    """Two arms over the seeds that have both.

    Attributes
    ----------
    first, second : str
    seeds : tuple of int
    difference : Difference or None
        Of `first` minus `second`; None if no seed has both.
    p_holm, p_holm_floor, p_equivalent_holm : float or None
        Corrected for all comparisons of the table: the p value, the smallest that the seeds allow, and the p value of
        the equivalence test.
    verdict : str
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: Difference | None
    p_holm: float | None = None
    p_holm_floor: float | None = None
    p_equivalent_holm: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Width:
    """A layer's width: in full, and the mean of what is kept."""

    layer: str
    kept: float
    full: int


@dataclass(frozen=True)
class Row:
    """One study over its seeds.

    Attributes
    ----------
    slug : str
        Its name in file names.
    network, pruner, pruned_by : str
        `pruned_by` is the pruner with its target and with what sets this row apart beside it.
    target : (str, float) or None
        What the pruner was told, such as ``("ratio", 0.5)``, where it is one number.
    sweep : str
        Equal for rows that differ in their target alone.
    best : tuple of str
        The arms of the pruned network with the highest mean, if there are two or more to choose from.
    macs_kept, params_kept : Sample or None
        Percent.
    one_pretrained : bool
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
    arms: tuple[ArmResult, ...]
    best: tuple[str, ...]
    macs_kept: Sample | None
    params_kept: Sample | None
    widths: tuple[Width, ...]
    comparisons: tuple[Comparison, ...]
    paper: PaperRow | None
    one_pretrained: bool
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name of the row in a sentence."""
        return f"{self.network}, {self.pruned_by}"

    def arm(self, name: str) -> ArmResult | None:
        """Return the results of an arm, if the row has it."""
        return next((result for result in self.arms if result.arm == name), None)


@dataclass(frozen=True)
class Table:
    """The rows of one data set, recipe and budget: the family that p values are corrected for."""

    dataset: str
    recipe: str
    budget: str
    arms: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Name of the table in a heading."""
        return f"{self.dataset}, {self.recipe} recipe, {self.budget} budget"


@dataclass(frozen=True)
class Report:
    """All tables.

    Attributes
    ----------
    tables : tuple of Table
    margin : float
        Points within which arms count as equivalent.
    runs : int
        How many runs the tables rest on.
    problems : tuple of str
        What could not be used, in words.
    """

    tables: tuple[Table, ...]
    margin: float
    runs: int
    problems: tuple[str, ...]


def compare(groups: Sequence[Group], *, margin: float, problems: Iterable[str] = ()) -> Report:
    """Work out a report.

    Parameters
    ----------
    groups : sequence of Group
    margin : float
        Points within which arms count as equivalent.
    problems : iterable of str
        What could not be used, in words.
    """
    families: dict[tuple[str, str, str], list[Group]] = defaultdict(list)
    for group in groups:
        families[group.dataset, group.recipe, group.budget].append(group)
    tables, number = [], 0
    for (dataset, recipe, budget), members in families.items():
        rows = []
        for group in members:
            number += 1
            rows.append(_row(group, margin, number))
        names = {result.arm for row in rows for result in row.arms}
        corrected = _corrected(rows, margin, recipe, budget)
        tables.append(Table(dataset, recipe, budget, tuple(_in_order(names)), tuple(corrected)))
    return Report(tuple(tables), margin, sum(len(group.runs) for group in groups), tuple(map(printable, problems)))


def _row(group: Group, margin: float, number: int) -> Row:
    runs = group.runs
    planned = {name for run in runs for name in (*run.trained, *run.study.arms)}
    results = [_arm(name, runs) for name in _in_order(planned)]
    after = [run.pruned.top1 for run in runs if run.pruned is not None and run.pruned.top1 is not None]
    if after:
        results.append(ArmResult(PRUNED, sample(after)))
    contenders = {r.arm: round(r.top1.mean, 2) for r in results if r.top1 is not None and _is_pruned_arm(r.arm)}
    paper = paper_row(group.experiment, runs[0].study.target)
    settings = [f"{name} {value[:20]}" for name, value in group.by]
    pruned_by = ", ".join([f"{group.pruner} {group.target}", *settings])
    return Row(
        slug=f"{number:02d}-{_slug(f'{group.model} {pruned_by}')}",
        network=group.model,
        pruner=group.pruner,
        pruned_by=pruned_by,
        target=next(((n, float(v)) for n, v in runs[0].study.target.items() if isinstance(v, int | float)), None),
        sweep=", ".join([group.model, group.pruner, *settings]),
        experiment=group.experiment,
        seeds=tuple(run.study.seed for run in runs),
        arms=tuple(results),
        best=tuple(arm for arm, mean in contenders.items() if len(contenders) > 1 and mean == max(contenders.values())),
        macs_kept=_kept([(run.pruned.macs, run.study.ledger.macs_reference) for run in runs if run.pruned]),
        params_kept=_kept([(run.pruned.params, run.large.params) for run in runs if run.pruned and run.large]),
        widths=_widths(runs),
        comparisons=tuple(_comparisons(runs, [r.arm for r in results], margin)),
        paper=paper,
        one_pretrained=len({run.study.seed for run in runs}) > 1 and len(_pretrained(runs)) == 1,
        notes=(*group.notes, *_missing(runs, planned), *_shared(runs), *_processes(runs), *_unlike_paper(runs, paper)),
    )


def _arm(name: str, runs: Sequence[Run]) -> ArmResult:
    done = [entry for run in runs if (entry := run.trained.get(name)) is not None and entry.finished]
    best = [entry.top1_best for entry in done if entry.top1_best is not None]
    return ArmResult(
        arm=name,
        top1=sample([entry.top1 for entry in done if entry.top1 is not None]) if done else None,
        top1_best=sample(best) if best and len(best) == len(done) else None,
        epochs=_mean([entry.epochs for entry in done]),
        params=_mean([entry.params for entry in done]),
        macs=_mean([entry.macs for entry in done]),
        train_flops=_mean([entry.train_flops for entry in done]),
        flops_before=_mean([_flops_before(entry) for entry in done]),
        curve=_curve(done),
    )


def _curve(entries: Sequence[Trained]) -> Curve | None:
    curves = [entry.curve for entry in entries if entry.curve]
    if not curves or len(curves) < len(entries):
        return None
    share = np.linspace(0, 1, max(map(len, curves)) + 1)[1:]
    top1 = np.array([np.interp(share * len(curve), np.arange(1, len(curve) + 1), curve) for curve in curves])
    flops = None
    own, before = _mean([entry.train_flops for entry in entries]), _mean([_flops_before(entry) for entry in entries])
    if own is not None and before is not None:
        flops = tuple((before + own * share).tolist())
    epochs = share * np.mean([len(curve) for curve in curves])
    low, high = top1.min(axis=0), top1.max(axis=0)
    return Curve(tuple(epochs.tolist()), flops, *(tuple(line.tolist()) for line in (top1.mean(axis=0), low, high)))


def _flops_before(entry: Trained) -> float | None:
    if entry.train_flops is None or entry.train_flops_total is None:
        return None
    return entry.train_flops_total - entry.train_flops


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if any value is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _kept(parts: Sequence[tuple[float | None, float | None]]) -> Sample | None:
    shares = [100 * part / whole for part, whole in parts if part is not None and whole]
    return sample(shares) if shares else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _widths(runs: Sequence[Run]) -> tuple[Width, ...]:
    layers: dict[tuple[str, int], list[Layer]] = defaultdict(list)
    for run in runs:
        for layer in run.pruned.layers if run.pruned else ():
            layers[layer.layer, layer.full].append(layer)
    return tuple(Width(name, float(np.mean([e.kept for e in found])), full) for (name, full), found in layers.items())


def _comparisons(runs: Sequence[Run], arms: Sequence[str], margin: float) -> Iterable[Comparison]:
    """Yield every arm of the pruned network against fine-tuning; without that, against the first one."""
    contenders = [arm for arm in arms if _is_pruned_arm(arm)]
    for first in contenders[1:]:
        second = contenders[0]
        pairs = [
            (run.study.seed, a.top1, b.top1)
            for run in runs
            if (a := run.arms.get(first)) is not None and (b := run.arms.get(second)) is not None
            if a.finished and b.finished and a.top1 is not None and b.top1 is not None
        ]
        difference = paired_difference([p[1] for p in pairs], [p[2] for p in pairs], margin=margin) if pairs else None
        yield Comparison(first, second, tuple(p[0] for p in pairs), difference)


def _corrected(rows: Sequence[Row], margin: float, recipe: str, budget: str) -> Iterable[Row]:
    """Yield the rows of a table with p values corrected for all its comparisons, and verdicts."""
    tested = [c.difference for row in rows for c in row.comparisons if c.difference is not None and c.difference.n > 1]
    p_holm = _holm_of([difference.p for difference in tested])
    floors = _holm_of([difference.p_floor for difference in tested])
    equivalent = _holm_of([d.p_equivalent for d in tested if d.p_equivalent is not None])
    for row in rows:
        finished = []
        for comparison in row.comparisons:
            difference = comparison.difference
            if difference is not None and difference.n > 1:
                comparison = replace(
                    comparison,
                    p_holm=p_holm[difference.p],
                    p_holm_floor=floors[difference.p_floor],
                    p_equivalent_holm=equivalent.get(difference.p_equivalent),
                )
            sentence = verdict(comparison, margin=margin, family=len(tested), recipe=recipe, budget=budget)
            if row.one_pretrained:
                sentence += " All seeds share one pretrained network: what training another would change is left out."
            finished.append(replace(comparison, verdict=sentence))
        yield replace(row, comparisons=tuple(finished))


def _holm_of(ps: Sequence[float]) -> dict[float | None, float]:
    return dict(zip(ps, holm(ps), strict=True))  # equal ones are corrected equally


def _missing(runs: Sequence[Run], planned: Iterable[str]) -> Iterable[str]:
    """Yield, in words, what seeds lack that others have or that was asked for."""
    for name in _in_order(set(planned)):
        for run in runs:
            entry = run.trained.get(name)
            if entry is not None and entry.finished:
                continue
            if entry is not None and entry.status == "failed":
                why = f"failed: {entry.reason or 'no reason was recorded'}"
            elif entry is not None:
                why = "has no accuracy (not a number)"
            elif name in run.study.arms:
                why = "is not finished"
            else:
                why = "was not asked for" if run.study.arms and name in ARMS else "is not there"
            yield f"seed {run.study.seed}: {NAMES.get(name, name)} {why}"


def _pretrained(runs: Sequence[Run]) -> dict[str, set[int]]:
    """Return the networks that were pruned, by stage, with the seeds that start from each."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        base = run.sparse or run.large
        # Where it is not recorded, each seed is taken to have its own.
        seeds[base.stage if base is not None and base.stage else f"{run.study.seed}"].add(run.study.seed)
    return seeds


def _shared(runs: Sequence[Run]) -> Iterable[str]:
    """Yield a note for each pretrained network that several seeds start from."""
    for stage, found in _pretrained(runs).items():
        if len(found) > 1:
            yield f"seeds {_list(found)} share one pretrained network, {stage}"


def _processes(runs: Sequence[Run]) -> Iterable[str]:
    """Yield a note if arms were trained by different numbers of processes."""
    numbers: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for run in runs:
        for name, entry in run.trained.items():
            if entry.processes:
                numbers[entry.processes].add(name)
    if len(numbers) > 1:
        parts = [f"{' and '.join(map(str, n))} in {', '.join(sorted(names))}" for n, names in sorted(numbers.items())]
        yield f"arms were trained by different numbers of processes: {'; '.join(parts)}"


def _unlike_paper(runs: Sequence[Run], paper: PaperRow | None) -> Iterable[str]:
    """Yield notes on what keeps accuracies from being comparable with the paper's."""
    if paper is None:
        return
    entries = [run.trained.get(name) for run in runs for name in ("large", "scratch_e")]
    lengths = {entry.epochs for entry in entries if entry is not None and entry.finished} - {None, paper.epochs}
    if lengths:
        yield f"not comparable with the paper: trained for {_list(lengths)} epochs instead of {paper.epochs}"
    datasets = [(run.study.settings or {}).get("dataset", {}) for run in runs]
    limits = [name for name in ("train_limit", "test_limit") if any(data.get(name) is not None for data in datasets)]
    if limits:
        yield f"not comparable with the paper: only part of the images is used ({_list(limits)})"
    if paper.note:
        yield f"the paper's accuracies: {paper.note}"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, sorted(values, key=str)))


def _is_pruned_arm(name: str) -> bool:
    """Tell whether an arm trains the pruned network; what this version does not know is taken for one that does."""
    if name in ARMS:
        return ARMS[name].network == "pruned"
    return name not in ("large", "sparse", PRUNED)


def _in_order(names: Iterable[str]) -> list[str]:
    order = [*PAPER_ARMS, *(name for name in ARMS if name not in PAPER_ARMS), "sparse", PRUNED]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(PAPER_ARMS) - 0.5, name))
