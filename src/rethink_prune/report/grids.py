"""A report's tables as cells, and the cells as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from rethink_prune.report.comparison import PRUNED, ArmResult, Comparison, Report, Table
from rethink_prune.report.statistics import Sample
from rethink_prune.report.verdicts import TITLES
from rethink_prune.text import markdown


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place.

    Attributes
    ----------
    text : str
    parts : mapping of str to float or None
        The numbers in full, where it shows any, by what their columns in a CSV file are called after the cell's own; a
        cell sorts by the first.
    bold : bool
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


def accuracy_grid(table: Table) -> Grid:
    """Return the table as the paper has it: a row for each network and target, a column for each arm."""
    columns = ("network", "pruned by", *(TITLES.get(arm, arm) for arm in table.arms), "MACs kept, %", "parameters, %")
    rows = []
    for row in table.rows:
        arms = [_accuracy(row.arm(name), bold=name in row.best) for name in table.arms]
        kept = [_sample(row.macs_kept, 1), _sample(row.params_kept, 1)]
        rows.append((Cell(row.network), Cell(row.pruned_by), *arms, *kept))
    caption = (
        "Top-1 in percent after the last epoch: mean ± standard deviation (n seeds). Bold: the best arm of the pruned "
        "network, by its mean alone."
    )
    return Grid("accuracy", table.title, columns, tuple(rows), caption, tuple(_notes(table)))


def difference_grid(table: Table, margin: float) -> Grid:
    """Return the comparisons of a table."""
    columns = (
        *("network", "pruned by", "arm", "against", "n", "difference", "95 % interval"),
        *("p", "p (Holm)", "least p (Holm)", "TOST p (Holm)"),
    )
    rows = [
        (Cell(row.network), Cell(row.pruned_by), *_names(comparison), *_difference(comparison))
        for row in table.rows
        for comparison in row.comparisons
    ]
    caption = (
        f"Points of top-1, paired by seed: paired-t interval; p of the sign-flip permutation test; TOST: equivalence "
        f"within {margin:g} points. Holm: corrected for all comparisons of this table; least p: what n allows."
    )
    return Grid("differences", f"Differences: {table.title}", columns, tuple(rows), caption)


def cost_grid(table: Table) -> Grid:
    """Return what each arm of a table takes."""
    columns = ("network", "pruned by", "arm", "epochs", "parameters", "MACs", "training FLOPs", "with ancestors")
    rows = []
    for row in table.rows:
        for result in row.arms:
            if result.arm == PRUNED or result.top1 is None:
                continue
            total = None
            if result.train_flops is not None and result.flops_before is not None:
                total = result.train_flops + result.flops_before
            numbers = [(result.epochs, "{:,.4g}"), (result.params, "{:,.0f}"), (result.macs, "{:,.0f}")]
            flops = [(result.train_flops, "{:.3g}"), (total, "{:.3g}")]
            cells = [_number(value, form) for value, form in (*numbers, *flops)]
            rows.append((Cell(row.network), Cell(row.pruned_by), Cell(TITLES.get(result.arm, result.arm)), *cells))
    caption = (
        "Means over seeds. MACs are those of convolutions and linear layers for one image; training FLOPs are 6 x MACs "
        "x images; ancestors are the trainings an arm starts from."
    )
    return Grid("cost", f"Cost: {table.title}", columns, tuple(rows), caption)


def paper_grid(table: Table) -> Grid | None:
    """Return a table's accuracies beside the paper's, or None where the paper has none of its rows."""
    columns = ("network", "pruned by", "arm", "best epoch on test", "paper", "difference")
    rows = []
    for row in table.rows:
        for arm, theirs in row.paper.top1.items() if row.paper else ():
            result = row.arm(arm)
            ours = result and (result.top1 if arm == PRUNED else result.top1_best)
            if not ours:
                continue
            cells = (_sample(ours, 2), _sample(theirs, 2), _number(ours.mean - theirs.mean, "{:+.2f}"))
            rows.append((Cell(row.network), Cell(row.pruned_by), Cell(TITLES.get(arm, arm)), *cells))
    if not rows:
        return None
    caption = (
        "Top-1 in percent of the best epoch on the test images, which is what the paper reports (Liu et al. 2019, "
        "arXiv:1810.05270v1). It favours arms that are tested more often, so nothing else here rests on it."
    )
    return Grid("paper", f"Beside the paper: {table.title}", columns, tuple(rows), caption)


def report_grids(report: Report) -> list[Grid]:
    """Return all tables of a report in their order."""
    grids = []
    for number, table in enumerate(report.tables, 1):
        shown = (accuracy_grid(table), difference_grid(table, report.margin), paper_grid(table), cost_grid(table))
        grids += [replace(grid, name=f"{grid.name}-{number}") for grid in shown if grid is not None and grid.rows]
    return grids


def to_markdown(grid: Grid) -> str:
    """Return a grid as Markdown: a heading, the table, its caption and its notes."""
    rows = [[f"**{escape_markdown(c.text)}**" if c.bold else escape_markdown(c.text) for c in row] for row in grid.rows]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in grid.notes)
    parts = [f"## {escape_markdown(grid.title)}", markdown(grid.columns, rows), grid.caption, notes]
    return "\n\n".join(filter(None, parts))


def to_csv(grid: Grid) -> str:
    """Return a grid as CSV with all digits; a mean has columns of its own for standard deviation and n."""
    columns = [
        list(dict.fromkeys(part for row in grid.rows for part in row[i].parts)) for i in range(len(grid.columns))
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = zip(grid.columns, columns, strict=True)
    writer.writerow([f"{name}{part}" for name, parts in names for part in parts or [""]])
    for row in grid.rows:
        cells = zip(row, columns, strict=True)
        writer.writerow([cell.parts.get(part, cell.text) for cell, parts in cells for part in parts or [""]])
    return text.getvalue()


def to_latex(grids: Iterable[Grid]) -> str:
    """Return grids as LaTeX tables; the document needs the package booktabs."""
    return "% \\usepackage{booktabs}\n\n" + "\n".join(map(_latex_table, grids))


def _latex_table(grid: Grid) -> str:
    columns = "l" * len(grid.columns[:2]) + "r" * len(grid.columns[2:])

    def line(cells: Iterable[str]) -> str:
        return f"  {' & '.join(cells)} \\\\"

    body = [
        line(f"\\textbf{{{_escape_latex(c.text)}}}" if c.bold else _escape_latex(c.text) for c in row)
        for row in grid.rows
    ]
    return "\n".join(
        [
            "\\begin{table}",
            f"  \\caption{{{_escape_latex(grid.title)}. {_escape_latex(grid.caption)}}}",
            f"  \\begin{{tabular}}{{{columns}}}",
            "  \\toprule",
            line(map(_escape_latex, grid.columns)),
            "  \\midrule",
            *body,
            "  \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _notes(table: Table) -> Iterable[str]:
    """Yield the notes of a table's rows, each once, with the rows it is about."""
    about: dict[str, list[str]] = {}
    for row in table.rows:
        for note in row.notes:
            about.setdefault(note, []).append(row.title)
    for note, titles in about.items():
        yield f"{'all rows' if 1 < len(titles) == len(table.rows) else '; '.join(titles)}: {note}."


def _accuracy(result: ArmResult | None, *, bold: bool) -> Cell:
    return _sample(result.top1 if result else None, 2, bold=bold)


def _number(value: float | None, form: str) -> Cell:
    return Cell("") if value is None else Cell(form.format(value), {"": value})


def _sample(value: Sample | None, digits: int, *, bold: bool = False) -> Cell:
    if value is None:
        return Cell("")
    spread = "" if value.sd is None else f" ± {value.sd:.{digits}f}"
    return Cell(f"{value.mean:.{digits}f}{spread} ({value.n})", {"": value.mean, " sd": value.sd, " n": value.n}, bold)


def _names(comparison: Comparison) -> tuple[Cell, Cell]:
    return Cell(TITLES.get(comparison.first, comparison.first)), Cell(TITLES.get(comparison.second, comparison.second))


def _difference(comparison: Comparison) -> tuple[Cell, ...]:
    difference = comparison.difference
    if difference is None:
        return (_number(0, "{}"), *[Cell("")] * 6)
    interval = Cell("none", {" low": None, " high": None})
    if difference.interval is not None:
        low, high = difference.interval
        interval = Cell(f"[{low:+.2f}, {high:+.2f}]", {" low": low, " high": high})
    ps = (comparison.p_holm, comparison.p_holm_floor, comparison.p_equivalent_holm)
    tested = [_number(value, "{:.2g}") for value in (difference.p if difference.n > 1 else None, *ps)]
    return _number(difference.n, "{}"), _number(difference.mean, "{:+.2f}"), interval, *tested


def escape_markdown(text: str) -> str:
    """Return `text` with nothing in it that Markdown or HTML would take for its own."""
    # What would end a cell, begin markup, or be HTML; brackets alone, as around intervals, make no link.
    for letters in ("\\", "`", "*", "|"):
        text = text.replace(letters, f"\\{letters}")
    text = text.replace("](", "]\\(").replace("]:", "]\\:")
    return text.replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "<": "$<$",
    ">": "$>$",
    "[": "{[}",  # at the start of a row, an option of the line break before it
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def _escape_latex(text: str) -> str:
    # Other letters would need packages of their own.
    return "".join(_LATEX.get(letter, letter if letter.isascii() else "?") for letter in text)
