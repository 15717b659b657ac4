"""A report's tables as cells: what stands in each, as text and as numbers. :mod:`documents` writes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rethink_prune.report.budget_axis import BudgetCurve, BudgetPoint, place_text
from rethink_prune.report.comparisons import ArmComparison
from rethink_prune.report.crossover import Place
from rethink_prune.report.detection import FROZEN_NORMS, DetectionRow, DetectionTable
from rethink_prune.report.efficiency import MEASURES, EfficiencySize, MatchedComparison
from rethink_prune.report.networks import PRUNED, RECALIBRATED, in_column_order, network_label
from rethink_prune.report.patterns import RowPattern
from rethink_prune.report.remaining import Size
from rethink_prune.report.results import Report, ResultRow, ResultTable
from rethink_prune.report.statistics import SeedStatistics
from rethink_prune.study.arms import known_arm


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place.

    Attributes
    ----------
    parts
        The numbers in full, where it shows any, by what their columns in a CSV file are called after the cell's own; a
        cell sorts by the first.
    """

    text: str
    parts: Mapping[str, float | None] = field(default_factory=dict)
    bold: bool = False

    @property
    def number(self) -> float | None:
        """What the cell sorts by; None if by its text."""
        return next(iter(self.parts.values()), None)


# Each row of a table with what stands in it after its names.
_Row = ResultRow | RowPattern | Size | EfficiencySize | MatchedComparison | DetectionRow
_Rows = Iterator[tuple[_Row, Iterable[Cell]]]
_Patterns = Iterable[ResultRow | RowPattern]


@dataclass(frozen=True)
class Grid:
    """A table to show: a title, columns, and cells; `caption` says how to read it, `notes` what to know of its rows.

    `name` is for file names.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    notes: tuple[str, ...] = ()


# How to read each kind of table.
_CAPTIONS = {
    "accuracy": "Top-1 in percent after the last epoch: mean ± standard deviation (n seeds). Bold: the best arm of the "
    "pruned network, by its mean alone. A ratio is the share that goes.",
    "differences": "Points of top-1, paired by seed: paired-t interval; p of the sign-flip permutation test; TOST: "
    "equivalence within {margin:g} points. Holm: corrected for all comparisons of this table; least p: what n allows.",
    "paper": "Top-1 in percent of the best epoch on the test images, which is what the paper reports (Liu et al. 2019, "
    "arXiv:1810.05270v1). It favours arms that are tested more often, so nothing else here rests on it.",
    "cost": "Means over seeds. MACs are those of convolutions and linear layers for one image, without masked weights; "
    "training FLOPs are 6 x MACs x images. With ancestors: with the trainings that a row starts from. With search: "
    "with those by which the pruned network's widths had to be found; empty where a run did not record it. Amortised: "
    "with ancestors, each divided by the rows of this report that build on it, as in a sweep over ratios. S_N: from "
    "scratch for N epochs; P_K-R_N: a parent trained for K epochs, pruned, retrained for N.",
    "remaining": "Top-1 in percent after the last epoch: mean ± standard deviation (n seeds), by what remains of the "
    "unpruned network. In rounds: pruned several times, each time of what remains. After round r: trained between "
    "rounds. With share_per_round, a study of r rounds has the same; where there is one, its own result stands.",
    "matched": "Methods against uniform pruning at equal size, by the arm named. Between a seed's sizes, top-1 is "
    "interpolated linearly in the logarithm of the size; the difference is that of its means from the smallest to the "
    "largest size that all these seeds have of both, in points, paired by seed. Holm: corrected for all comparisons of "
    "this table, which are a family of their own; otherwise as for differences between arms. TOST: equivalence within "
    "{margin:g} points. At smallest, at largest: the mean difference there.",
    "efficiency": "Error: 100 less top-1 after the last epoch, in percent: mean ± standard deviation (n seeds). "
    "Parameters and MACs are means over seeds, without masked weights. Front: no size of any method of this network "
    "and arm is as small and has as low a mean error.",
    "widths": "Kept: mean ± standard deviation (n seeds), of channels, single weights or blocks. Size: of the layer's "
    "output.",
    "stages": "A layer stage is the layers whose outputs have one size. Each seed's average over a stage's layers, "
    "then mean ± standard deviation (n seeds): what is kept, of channels, single weights or blocks, and its share.",
    "kernels": "Percent of the kernels that keep each position, row by row, averaged over the layers of a stage and "
    "over seeds. Without a stage: over all layers with such kernels.",
    "rounds": "Means over seeds. Before: top-1 of the network that the round prunes. Trained: after the training that "
    "follows, between this round and the next; those after the last round are the arms.",
    "lengths": "Gap: top-1 of the retrained network less that of the same architecture from scratch, in points, paired "
    "by seed. Equal training: both train for N epochs. Equal total computation: from scratch for as many epochs as the "
    "large network's training and N epochs of retraining pay for. The intervals are pointwise: each holds at 95 % for "
    "its own N, not for all N at once. Holm: p corrected for all N of a curve; bold: a gap that is shown after it. "
    "TOST: equivalence within {margin:g} points.",
    "detection": "mAP in percent on the test pictures after the last epoch, as VOC 2007 measures it: mean ± standard "
    "deviation (n seeds). Bold: the best pruned network, by its mean alone. Prune-C: pruned and fine-tuned on "
    "classification, then trained to detect. Prune-D: the unpruned network's detector, pruned and trained again. "
    "Scratch-E and Scratch-B: the pruned network trained from scratch on classification, then to detect.",
    "detection_differences": "Points of mAP, paired by seed; otherwise as for differences between arms. TOST: "
    "equivalence within {margin:g} points. Holm: corrected for all comparisons of this table, which are a family of "
    "their own.",
    "detection_coco": "COCO's average precision in percent, over overlaps from 0.5 to 0.95 (AP) and at one: mean ± "
    "standard deviation (n seeds). No verdict rests on it.",
    "detection_cost": "Means over seeds. MACs are those of the backbone, the proposals and the regions of one picture "
    "of mean size. Training FLOPs: of the detector alone. With ancestors: with all trainings that it builds on, "
    "classification among them. Amortised: what several rows share is divided among them.",
    "detection_classes": "Average precision in percent, by class: mean ± standard deviation (n seeds).",
    "crossover": "The N at which the mean gap reaches zero, interpolated in log N, where retraining has lost its head "
    "start. Its interval holds that N, and all at which the paired-t interval of the interpolated gap holds zero. If "
    "the gap changes its sign more than once, the change counts that agrees with most of the gaps. Below or beyond: "
    "outside the lengths that were run.",
}
_KEPT_COLUMNS = ("MACs kept, %", "parameters kept, %")
_P_COLUMNS = ("p", "p (Holm)", "least p (Holm)", "TOST p (Holm)")
_DIFFERENCE_COLUMNS = ("arm", "against", "n", "difference", "95 % interval", *_P_COLUMNS)
_PAPER_COLUMNS = ("arm", "best epoch on test", "paper", "difference")
_FLOPS_COLUMNS = ("training FLOPs", "with ancestors", "with search", "amortised")
_COST_COLUMNS = ("arm", "notation", "epochs", "parameters", "MACs", *_FLOPS_COLUMNS)
_GAP_COLUMNS = ("n", "gap", "95 % interval", "p", "p (Holm)", "TOST p (Holm)")
_LENGTH_COLUMNS = ("equal", "N", "N from scratch", "retrained", "from scratch", *_GAP_COLUMNS)
_SIZE_COLUMNS = ("method", "arm", "parameters", "MACs", "error, %", "front")
_MATCHED_COLUMNS = ("equal", "smallest", "largest", "arm", *_DIFFERENCE_COLUMNS[1:], "at smallest", "at largest")
_WIDTH_COLUMNS = ("layer", "size", "kept", "in full", "kept, %")
_STAGE_COLUMNS = ("layer stage", "layers", "kept", "in full", "kept, %")
_KERNEL_COLUMNS = ("layer stage", "kernel", "layers", "n", "kept, %")
_ROUND_SIZES = ("round", "parameters", "parameters kept, %", "channels", "MACs")
_ROUND_COLUMNS = (*_ROUND_SIZES, "before", "pruned", "statistics re-estimated", "trained", "epochs")
_DETECTION_COSTS = ("detector", "epochs", "parameters", "MACs", "training FLOPs", "with ancestors", "amortised")
_COCO_COLUMNS = ("detector", "AP", "AP at 0.5", "AP at 0.75")
_CROSSOVER_COLUMNS = ("equal", "lengths", "n", "crossover N", "95 % from", "95 % to", "crossover N of each seed")


def report_grids(report: Report) -> list[Grid]:
    """Return all tables of a report in their order; those without rows are left out."""
    grids = []
    for number, table in enumerate(report.tables, 1):
        arms, sized = (tuple(network_label(arm).title for arm in names) for names in (table.arms, _sized_arms(table)))
        for kind, prefix, columns, find_rows in (
            ("accuracy", "", (*arms, *_KEPT_COLUMNS), _accuracy_rows),
            ("crossover", "Crossover: ", _CROSSOVER_COLUMNS, _crossover_rows),
            ("lengths", "Retraining against from scratch: ", _LENGTH_COLUMNS, _length_rows),
            ("differences", "Differences: ", _DIFFERENCE_COLUMNS, _difference_rows),
            ("matched", "At equal size: ", _MATCHED_COLUMNS, _matched_rows),
            ("efficiency", "Error by size: ", _SIZE_COLUMNS, _efficiency_rows),
            ("remaining", "What remains: ", ("cut", *_KEPT_COLUMNS, *sized), _size_rows),
            ("stages", "Layer stages: ", _STAGE_COLUMNS, _table_stage_rows),
            ("kernels", "Kernel positions: ", _KERNEL_COLUMNS, _table_kernel_rows),
            ("rounds", "Rounds: ", _ROUND_COLUMNS, _round_rows),
            ("paper", "Beside the paper: ", _PAPER_COLUMNS, _paper_rows),
            ("cost", "Cost: ", _COST_COLUMNS, _cost_rows),
        ):
            rows = tuple((Cell(row.network), Cell(row.pruned_by), *cells) for row, cells in find_rows(table))
            # Some tables have nothing to compare, or no row of the paper.
            if rows:
                columns = ("network", "pruned by", *columns)
                caption = _CAPTIONS[kind].format(margin=report.margin)
                if kind == "accuracy":
                    caption = " ".join([caption, *_meanings(table)])
                if kind == "cost":
                    caption = " ".join([caption, *_notations(table)])
                notes = tuple(_notes_about_rows(table)) if kind == "accuracy" else ()
                grids.append(Grid(f"{kind}-{number}", f"{prefix}{table.title}", columns, rows, caption, notes))
        grids += _detection_grids(table, number, report.margin)
    return grids


def detection_class_grids(report: Report) -> list[Grid]:
    """Return average precision by class as tables, a row for each class: too long to be shown."""
    return [
        grid
        for number, table in enumerate(report.tables, 1)
        for grid in _detection_grids(table, number, report.margin, classes=True)
    ]


def _detection_grids(table: ResultTable, number: int, margin: float, *, classes: bool = False) -> Iterator[Grid]:
    """Yield the tables of each detection data set; `classes`: those by class instead of the others."""
    for place, found in enumerate(table.detection, 1):
        entries = tuple(network_label(entry).title for entry in found.entries)
        kinds = (
            ("detection", "Detection: ", entries, _detection_rows),
            ("detection_differences", "Differences in detection: ", _DIFFERENCE_COLUMNS, _detection_difference_rows),
            ("detection_coco", "Detection as COCO measures it: ", _COCO_COLUMNS, _coco_rows),
            ("detection_cost", "Cost of detection: ", _DETECTION_COSTS, _detection_cost_rows),
        )
        by_class = (("detection_classes", "Detection by class: ", ("class", *entries), _class_rows),)
        for kind, prefix, columns, find_rows in by_class if classes else kinds:
            rows = tuple((Cell(row.network), Cell(row.pruned_by), *cells) for row, cells in find_rows(found))
            if rows:
                notes = (FROZEN_NORMS, *_notes_about_rows(found)) if kind == "detection" else ()
                columns, caption = ("network", "pruned by", *columns), _CAPTIONS[kind].format(margin=margin)
                yield Grid(f"{kind}-{number}-{place}", f"{prefix}{found.title}", columns, rows, caption, notes)


def pattern_grids(patterns: Sequence[RowPattern]) -> list[Grid]:
    """Return what pruning leaves as tables, over all rows; those without rows are left out."""
    return [
        Grid(kind, title, ("network", "pruned by", *columns), rows, _CAPTIONS[kind])
        for kind, title, columns, found in (
            ("widths", "Kept widths", _WIDTH_COLUMNS, _width_rows(patterns)),
            ("stages", "Layer stages", _STAGE_COLUMNS, _stage_rows(patterns)),
            ("kernels", "Kernel positions", _KERNEL_COLUMNS, _kernel_rows(patterns)),
        )
        if (rows := tuple((Cell(row.network), Cell(row.pruned_by), *cells) for row, cells in found))
    ]


def _table_stage_rows(table: ResultTable) -> _Rows:
    return _stage_rows(table.rows)


def _table_kernel_rows(table: ResultTable) -> _Rows:
    return _kernel_rows(table.rows)


def _width_rows(patterns: _Patterns) -> _Rows:
    for row in patterns:
        for width in row.widths:
            kept = _cell(SeedStatistics(width.n, width.kept, width.sd), ".1f")
            share = _cell(100 * width.kept / width.full, ".1f")
            yield row, [Cell(width.layer), Cell(width.size), kept, _cell(width.full, ",d"), share]


def _stage_rows(patterns: _Patterns) -> _Rows:
    for row in patterns:
        for stage in row.stages:
            kept, share = _cell(stage.width, ",.1f"), _cell(stage.share, ".1f")
            yield row, [Cell(stage.size), _cell(stage.layers, "d"), kept, _cell(stage.full, ",.1f"), share]


def _kernel_rows(patterns: _Patterns) -> _Rows:
    for row in patterns:
        for pattern in row.kernels:
            shares = {f" {r + 1},{c + 1}": 100 * v for r, line in enumerate(pattern.kept) for c, v in enumerate(line)}
            text = "; ".join(" ".join(f"{100 * value:.1f}" for value in line) for line in pattern.kept)
            counts = (_cell(count, "d") for count in (pattern.layers, pattern.n))
            yield row, [Cell(pattern.size), Cell(pattern.kernel), *counts, Cell(text, shares)]


def _meanings(table: ResultTable) -> Iterator[str]:
    for name in table.arms:
        if (arm := known_arm(name)) is not None and arm.meaning:
            yield f"{arm.title}: {arm.meaning}."
    if any(row.on_axis for row in table.rows):
        yield "Arms that are compared over lengths have a table of their own."


def _notations(table: ResultTable) -> Iterator[str]:
    """Yield what notations mean that only some reports have."""
    if any(result.notation.startswith("T_") for row in table.rows for result in row.arms):
        yield "T_N: a ticket, rewound or random ones too, trained for N epochs."
    if any(row.rounds for row in table.rows):
        yield "In rounds, the trainings between them are ancestors, and K is the epochs of all trainings before."


def _accuracy_rows(table: ResultTable) -> _Rows:
    """Yield the rows as the paper has them: one for each network and target, with a cell for each arm."""
    for row in table.rows:
        top1 = {result.arm: result.top1 for result in row.arms}
        arms = (_cell(top1.get(arm), ".2f", bold=arm in row.best) for arm in table.arms)
        yield row, [*arms, _cell(row.macs_kept, ".1f"), _cell(row.params_kept, ".1f")]


def _difference_rows(table: ResultTable) -> _Rows:
    return ((row, _comparison_cells(comparison)) for row in table.rows for comparison in row.comparisons)


def _crossover_rows(table: ResultTable) -> _Rows:
    for row in table.rows:
        for curve in row.curves:
            if curve.crossover is not None:
                yield row, _crossover_cells(curve)


def _crossover_cells(curve: BudgetCurve) -> Iterator[Cell]:
    found = curve.crossover
    assert found is not None
    shortest, longest = f"{found.shortest:.4g}", f"{found.longest:.4g}"

    def cell(place: Place | None) -> Cell:
        if place is None:
            return Cell("none")
        return Cell(place_text(place, shortest, longest), {} if isinstance(place, str) else {"": place})

    yield Cell(curve.title)
    yield Cell(f"{shortest} to {longest}")
    yield _cell(len(curve.seeds), "d")
    yield from (cell(place) for place in (found.place, *(found.interval or (None, None))))
    yield Cell(", ".join(cell(place).text for place in found.by_seed))


def _length_rows(table: ResultTable) -> _Rows:
    for row in table.rows:
        for curve in row.curves:
            for point in curve.points:
                yield row, [Cell(curve.title), *_point_cells(point)]


def _point_cells(point: BudgetPoint) -> Iterator[Cell]:
    yield from (_cell(epochs, ",.4g") for epochs in (point.epochs, point.scratch_epochs))
    yield from (_cell(top1, ".2f") for top1 in (point.top1, point.scratch_top1))
    # The lengths name the two arms already, and the verdict says what n allows.
    _, _, n, gap, interval, p, p_holm, _, equivalent = _comparison_cells(point.comparison)
    yield from (n, replace(gap, bold=point.survives), interval, p, p_holm, equivalent)


def _sized_arms(table: ResultTable) -> list[str]:
    return ["large", *in_column_order({arm for sweep in table.sweeps for arm in sweep.arms})]


def _size_rows(table: ResultTable) -> _Rows:
    for sweep in table.sweeps:
        for size in sweep.sizes:
            top1 = {**size.top1, "large": sweep.unpruned}
            arms = (_cell(top1.get(arm), ".2f") for arm in _sized_arms(table))
            kept = (_cell(share, ".3g") for share in (size.macs_kept, size.params_kept))
            yield size, [Cell("in rounds" if size.in_rounds else "one"), *kept, *arms]


def _matched_rows(table: ResultTable) -> _Rows:
    for curves in table.efficiency:
        for each in curves.matched:
            spans = (_cell(size, ",.0f") for size in (each.smallest, each.largest))
            _, *compared = _comparison_cells(each.comparison)
            gaps = (_cell(gap, "+.2f") for gap in (each.gap_smallest, each.gap_largest))
            yield each, [Cell(MEASURES[each.measure]), *spans, _arm_cell(curves.arm), *compared, *gaps]


def _efficiency_rows(table: ResultTable) -> _Rows:
    for curves in table.efficiency:
        for curve in curves.methods:
            for size in curve.sizes:
                costs = (_cell(cost, ",.0f") for cost in (size.params, size.macs))
                front = Cell(", ".join(MEASURES[measure] for measure in size.front))
                yield size, [Cell(curve.method), _arm_cell(curves.arm), *costs, _cell(size.error, ".2f"), front]


def _arm_cell(arm: str) -> Cell:
    return Cell(network_label(arm).title)


def _round_rows(table: ResultTable) -> _Rows:
    for row in table.rows:
        for each in row.rounds:
            costs = (_cell(each.channels, ",.0f"), _cell(each.macs, ",.0f"))
            top1 = (each.top1_before, each.top1, each.top1_recalibrated, each.top1_trained)
            cells = (_cell(each.params, ",.0f"), _cell(each.params_kept, ".3g"), *costs)
            yield row, [_cell(each.round, "d"), *cells, *(_cell(t, ".2f") for t in top1), _cell(each.epochs, ",.4g")]


def _detection_rows(table: DetectionTable) -> _Rows:
    """Yield the rows as the paper has them: one for each network and target, with a cell for each detector."""
    for row in table.rows:
        means = {found.entry: found.map for found in row.detectors}
        yield row, [_cell(means.get(entry), ".2f", bold=entry in row.best) for entry in table.entries]


def _detection_difference_rows(table: DetectionTable) -> _Rows:
    return ((row, _comparison_cells(comparison)) for row in table.rows for comparison in row.comparisons)


def _coco_rows(table: DetectionTable) -> _Rows:
    for row in table.rows:
        for found in row.detectors:
            if found.coco:
                measures = (found.coco.get(name) for name in ("map", "map_50", "map_75"))
                yield row, [_arm_cell(found.entry), *(_cell(value, ".2f") for value in measures)]


def _detection_cost_rows(table: DetectionTable) -> _Rows:
    for row in table.rows:
        for found in row.detectors:
            if found.map is not None:
                sizes = (_cell(size, ",.0f") for size in (found.params, found.macs))
                flops = (_cell(each, ".3g") for each in (found.train_flops, found.flops_total, found.flops_amortised))
                yield row, [_arm_cell(found.entry), _cell(found.epochs, ",.4g"), *sizes, *flops]


def _class_rows(table: DetectionTable) -> _Rows:
    for row in table.rows:
        by_entry = {found.entry: found.ap for found in row.detectors}
        for name in dict.fromkeys(name for ap in by_entry.values() for name in ap):
            yield row, [Cell(name), *(_cell(by_entry.get(e, {}).get(name), ".2f") for e in table.entries)]


def _cost_rows(table: ResultTable) -> _Rows:
    for row in table.rows:
        for result in row.arms:
            # Pruning itself trains nothing, and means over no seed are not known.
            if result.arm not in (PRUNED, RECALIBRATED) and result.top1 is not None:
                numbers = (_cell(result.epochs, ",.4g"), _cell(result.params, ",.0f"), _cell(result.macs, ",.0f"))
                flops = [result.train_flops, result.flops_total, result.train_flops_with_search]
                cells = (_cell(f, ".3g") for f in (*flops, result.train_flops_amortised))
                yield row, [Cell(network_label(result.arm).title), Cell(result.notation), *numbers, *cells]


def _paper_rows(table: ResultTable) -> _Rows:
    """Yield a table's accuracies beside the paper's, where it has them."""
    for row in table.rows:
        for arm, theirs in row.paper.top1.items() if row.paper else ():
            result = row.arm(arm)
            if ours := result and (result.top1 if arm == PRUNED else result.top1_best):
                numbers = (_cell(ours, ".2f"), _cell(theirs, ".2f"), _cell(ours.mean - theirs.mean, "+.2f"))
                yield row, [Cell(network_label(arm).title), *numbers]


def _notes_about_rows(table: ResultTable | DetectionTable) -> Iterator[str]:
    """Yield the notes of a table's rows, each once, with the rows it is about."""
    about: dict[str, list[str]] = {}
    for row in table.rows:
        for note in row.notes:
            about.setdefault(note, []).append(row.title)
    for note, titles in about.items():
        yield f"{'all rows' if 1 < len(titles) == len(table.rows) else '; '.join(titles)}: {note}."


def _cell(value: SeedStatistics | float | None, form: str, *, bold: bool = False) -> Cell:
    """Return the cell of a number, or of a mean with its standard deviation and n, in a format such as ``.2f``."""
    if value is None:
        return Cell("")
    if not isinstance(value, SeedStatistics):
        return Cell(format(value, form), {"": value})
    spread = "" if value.sd is None else f" ± {value.sd:{form}}"
    parts = {"": value.mean, " sd": value.sd, " n": value.n}
    return Cell(f"{value.mean:{form}}{spread} ({value.n})", parts, bold)


def _comparison_cells(comparison: ArmComparison) -> Iterator[Cell]:
    difference, tested = comparison.difference, comparison.tested
    yield from (Cell(network_label(arm).title) for arm in (comparison.first, comparison.second))
    yield _cell(difference.n if difference else 0, "d")
    yield _cell(difference.mean if difference else None, "+.2f")
    if difference is None:
        yield Cell("")
    elif difference.interval is None:
        # The empty parts keep the two columns of the interval in a CSV file.
        yield Cell("none", {" low": None, " high": None})
    else:
        low, high = difference.interval
        yield Cell(f"[{low:+.2f}, {high:+.2f}]", {" low": low, " high": high})
    ps = (tested.p if tested else None, comparison.p_holm, comparison.p_holm_floor, comparison.p_equivalent_holm)
    yield from (_cell(p, ".2g") for p in ps)
