"""A report's tables as cells: what stands in each, as text and as numbers. :mod:`documents` writes them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rethink_prune.report.comparisons import ArmComparison
from rethink_prune.report.networks import PRUNED, network_label
from rethink_prune.report.results import Report, ResultRow, ResultTable
from rethink_prune.report.statistics import Difference, SeedStatistics


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


def report_grids(report: Report) -> list[Grid]:
    """Return all tables of a report in their order; those without rows are left out."""
    grids = []
    for number, table in enumerate(report.tables, 1):
        grids += [_accuracy_grid(number, table), _difference_grid(number, table, report.margin)]
        grids += [_paper_grid(number, table), _cost_grid(number, table)]
    # Some tables have nothing to compare, or no row of the paper.
    return [grid for grid in grids if grid.rows]


def _accuracy_grid(number: int, table: ResultTable) -> Grid:
    """Return the table as the paper has it: a row for each network and target, a column for each arm."""
    titles = (network_label(arm).title for arm in table.arms)
    rows = []
    for row in table.rows:
        top1 = {result.arm: result.top1 for result in row.arms}
        arms = [_cell(top1.get(arm), ".2f", bold=arm in row.best) for arm in table.arms]
        rows.append((*_row_names(row), *arms, _cell(row.macs_kept, ".1f"), _cell(row.params_kept, ".1f")))
    caption = (
        "Top-1 in percent after the last epoch: mean ± standard deviation (n seeds). Bold: the best arm of the pruned "
        "network, by its mean alone."
    )
    columns = ("network", "pruned by", *titles, "MACs kept, %", "parameters, %")
    notes = tuple(_notes_about_rows(table))
    return Grid(f"accuracy-{number}", table.title, columns, tuple(rows), caption, notes)


def _difference_grid(number: int, table: ResultTable, margin: float) -> Grid:
    columns = (
        *("network", "pruned by", "arm", "against", "n", "difference", "95 % interval"),
        *("p", "p (Holm)", "least p (Holm)", "TOST p (Holm)"),
    )
    rows = tuple((*_row_names(row), *_comparison_cells(each)) for row in table.rows for each in row.comparisons)
    caption = (
        f"Points of top-1, paired by seed: paired-t interval; p of the sign-flip permutation test; TOST: equivalence "
        f"within {margin:g} points. Holm: corrected for all comparisons of this table; least p: what n allows."
    )
    return Grid(f"differences-{number}", f"Differences: {table.title}", columns, rows, caption)


def _cost_grid(number: int, table: ResultTable) -> Grid:
    columns = ("network", "pruned by", "arm", "epochs", "parameters", "MACs", "training FLOPs", "with ancestors")
    rows = []
    for row in table.rows:
        for result in row.arms:
            # Pruning itself trains nothing, and means over no seed are not known.
            if result.arm != PRUNED and result.top1 is not None:
                numbers = (_cell(result.epochs, ",.4g"), _cell(result.params, ",.0f"), _cell(result.macs, ",.0f"))
                flops = (_cell(result.train_flops, ".3g"), _cell(result.flops_total, ".3g"))
                rows.append((*_row_names(row), Cell(network_label(result.arm).title), *numbers, *flops))
    caption = (
        "Means over seeds. MACs are those of convolutions and linear layers for one image; training FLOPs are 6 x MACs "
        "x images; ancestors are the trainings an arm starts from."
    )
    return Grid(f"cost-{number}", f"Cost: {table.title}", columns, tuple(rows), caption)


def _paper_grid(number: int, table: ResultTable) -> Grid:
    """Return a table's accuracies beside the paper's; without rows where the paper has none of them."""
    columns = ("network", "pruned by", "arm", "best epoch on test", "paper", "difference")
    rows = []
    for row in table.rows:
        for arm, theirs in row.paper.top1.items() if row.paper else ():
            result = row.arm(arm)
            ours = result and (result.top1 if arm == PRUNED else result.top1_best)
            if ours:
                numbers = (_cell(ours, ".2f"), _cell(theirs, ".2f"), _cell(ours.mean - theirs.mean, "+.2f"))
                rows.append((*_row_names(row), Cell(network_label(arm).title), *numbers))
    caption = (
        "Top-1 in percent of the best epoch on the test images, which is what the paper reports (Liu et al. 2019, "
        "arXiv:1810.05270v1). It favours arms that are tested more often, so nothing else here rests on it."
    )
    return Grid(f"paper-{number}", f"Beside the paper: {table.title}", columns, tuple(rows), caption)


def _notes_about_rows(table: ResultTable) -> Iterator[str]:
    """Yield the notes of a table's rows, each once, with the rows it is about."""
    about: dict[str, list[str]] = {}
    for row in table.rows:
        for note in row.notes:
            about.setdefault(note, []).append(row.title)
    for note, titles in about.items():
        yield f"{'all rows' if 1 < len(titles) == len(table.rows) else '; '.join(titles)}: {note}."


def _row_names(row: ResultRow) -> tuple[Cell, Cell]:
    return Cell(row.network), Cell(row.pruned_by)


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
    yield _interval_cell(difference)
    ps = (tested.p if tested else None, comparison.p_holm, comparison.p_holm_floor, comparison.p_equivalent_holm)
    yield from (_cell(p, ".2g") for p in ps)


def _interval_cell(difference: Difference | None) -> Cell:
    if difference is None:
        return Cell("")
    if difference.interval is None:
        # The empty parts keep the two columns of the interval in a CSV file.
        return Cell("none", {" low": None, " high": None})
    low, high = difference.interval
    return Cell(f"[{low:+.2f}, {high:+.2f}]", {" low": low, " high": high})
