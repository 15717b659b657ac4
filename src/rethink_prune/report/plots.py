"""A report's pictures: told apart with any colour vision, and in black and white by line style and marker."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from rethink_prune.files import write_atomically
from rethink_prune.report.comparison import ArmResult, Report, Row, Table
from rethink_prune.report.verdicts import TITLES

# Okabe and Ito's palette, a line style and a marker for each arm.
_STYLES = {
    "large": ("#000000", (0, (1, 1)), "s"),
    "finetune": ("#E69F00", "-", "o"),
    "scratch_e": ("#56B4E9", "--", "^"),
    "scratch_b": ("#0072B2", "-.", "D"),
    "large_longer": ("#999999", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "sparse": ("#009E73", (0, (3, 1, 1, 1)), "P"),
}
_OTHER = ("#CC79A7", (0, (6, 2)), "X")

# The same report gives the same files; names are text, never formulas; letters are drawn, so any viewer shows them.
_RC: dict[Any, Any] = {
    "svg.hashsalt": "rethink-prune",
    "text.parse_math": False,
    "svg.fonttype": "path",
    "axes.grid": True,
}
_RC |= {"grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Picture:
    """A picture: its name in file names, what it shows, and its content as PNG and as SVG."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def draw(report: Report) -> list[Picture]:
    """Draw all pictures of a report for which it has the numbers."""
    with mpl.rc_context(_RC):
        return [_picture(*drawn) for table in report.tables for drawn in _figures(table)]


def save(pictures: Sequence[Picture], folder: Path) -> None:
    """Write pictures as PNG and SVG files."""
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.png)
        write_atomically(folder / f"{picture.name}.svg", picture.svg)


def _picture(name: str, caption: str, figure: Figure) -> Picture:
    files = {}
    for form, options in (("png", {"dpi": 150, "metadata": {"Software": None}}), ("svg", {"metadata": {"Date": None}})):
        file = io.BytesIO()
        figure.savefig(file, format=form, **options)
        files[form] = file.getvalue()
    return Picture(name, caption, **files)


def _figures(table: Table) -> Iterator[tuple[str, str, Figure]]:
    first = table.rows[0].slug.split("-")[0]
    if figure := _differences(table):
        words = "Difference to the arm named second, paired by seed, with its 95 % interval"
        yield f"differences-{first}", f"{words}: {table.title}", figure
    for rows in _sweeps(table):
        words = "Top-1 after the last epoch against how much is pruned, mean and standard deviation over seeds"
        yield f"targets-{rows[0].slug.split('-')[0]}", f"{words}: {rows[0].sweep}", _against_target(rows)
    for row in table.rows:
        if figure := _curves(row):
            words = "Top-1 during training: mean over seeds, band from the lowest to the highest seed"
            yield f"curves-{row.slug}", f"{words}: {row.title}", figure
        if figure := _ledger(row):
            yield f"ledger-{row.slug}", f"Where the training FLOPs of each arm went: {row.title}", figure
        if row.widths:
            words = "Width of each layer, kept and in full, in channels or, where those are pruned, in single weights"
            yield f"widths-{row.slug}", f"{words}: {row.title}", _widths(row)


def _curves(row: Row) -> Figure | None:
    drawn = [result for result in row.arms if result.curve is not None]
    if not drawn:
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_epoch, by_flops = figure.subplots(1, 2, sharey=True)
    for result in drawn:
        curve = result.curve
        assert curve is not None
        _line(by_epoch, result, curve.epoch)
        if curve.flops is not None:
            _line(by_flops, result, curve.flops)
    by_epoch.set(xlabel="epoch", ylabel="test top-1 (%)")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_flops.set(xlabel="training FLOPs, ancestors included")
    by_flops.xaxis.set_major_formatter(EngFormatter())
    by_epoch.legend(frameon=False)
    return figure


def _line(axes: Axes, result: ArmResult, x: Sequence[float]) -> None:
    curve = result.curve
    assert curve is not None
    color, dashes, marker = _STYLES.get(result.arm, _OTHER)
    axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
    every = max(1, len(x) // 8)
    marked = ((len(x) - 1) % every, every)  # the last epoch among them
    style: dict[str, Any] = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4}
    axes.plot(x, curve.mean, **style, markevery=marked, label=_title(result.arm))


def _against_target(rows: Sequence[Row]) -> Figure:
    """Draw accuracies against the target where it is a number, else against the MACs that are kept."""
    names = {row.target and row.target[0] for row in rows}
    name = names.pop() if len(names) == 1 else None

    def place(row: Row) -> float | None:
        if name and row.target:
            return row.target[1]
        return row.macs_kept.mean if row.macs_kept else None

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(result.arm for row in rows for result in row.arms):
        if arm not in _STYLES and arm in TITLES:
            continue  # right after pruning: it would flatten all the others
        points = [(place(row), result.top1) for row in rows if (result := row.arm(arm)) is not None]
        known = sorted((x, top1.mean, top1.sd or 0) for x, top1 in points if x is not None and top1 is not None)
        if known:
            color, dashes, marker = _STYLES.get(arm, _OTHER)
            x, mean, sd = zip(*known, strict=True)
            style: dict[str, Any] = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 5}
            axes.errorbar(x, mean, yerr=sd, capsize=3, label=_title(arm), **style)
    axes.set(xlabel=name or "MACs kept (%)", ylabel="test top-1 (%)")
    axes.legend(frameon=False)
    return figure


def _sweeps(table: Table) -> Iterator[list[Row]]:
    """Yield the rows of one network and pruner that differ in how much is pruned."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        found[row.sweep].append(row)
    for rows in found.values():
        if len(rows) > 1:
            yield rows


def _differences(table: Table) -> Figure | None:
    shown = [
        (f"{_title(c.first)} minus {_title(c.second)}\n{row.title}", c.first, c.difference)
        for row in table.rows
        for c in row.comparisons
        if c.difference is not None
    ]
    if not shown:
        return None
    figure = Figure(figsize=(7.5, 1 + 0.55 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, (_, arm, difference) in enumerate(shown):
        color, _, marker = _STYLES.get(arm, _OTHER)
        low, high = difference.interval or (difference.mean, difference.mean)
        error = [[difference.mean - low], [high - difference.mean]]
        axes.errorbar(difference.mean, y, xerr=error, color=color, marker=marker, capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [_clip(label) for label, _, _ in shown], fontsize=8)
    axes.set(xlabel="points of top-1", ylim=(len(shown) - 0.5, -0.5))
    return figure


def _ledger(row: Row) -> Figure | None:
    shown = [r for r in row.arms if r.train_flops is not None and r.flops_before is not None]
    if not shown:
        return None
    figure = Figure(figsize=(6.5, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    before = np.array([r.flops_before for r in shown], dtype=float)
    own = np.array([r.train_flops for r in shown], dtype=float)
    places = np.arange(len(shown))
    axes.barh(places, before, color="#BBBBBB", edgecolor="black", hatch="//", label="what it starts from")
    axes.barh(places, own, left=before, color="#0072B2", edgecolor="black", label="its own training")
    axes.set_yticks(places, [_title(r.arm) for r in shown])
    axes.invert_yaxis()
    axes.set(xlabel="training FLOPs, mean over seeds")
    axes.xaxis.set_major_formatter(EngFormatter())
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _widths(row: Row) -> Figure:
    count = len(row.widths)
    figure = Figure(figsize=(min(16.0, max(5.0, 1.5 + 0.28 * count)), 3.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(count)
    axes.bar(places, [w.full for w in row.widths], color="white", edgecolor="black", hatch="..", label="in full")
    axes.bar(places, [w.kept for w in row.widths], color="#0072B2", edgecolor="black", label="kept")
    names = [_clip(w.layer, 30) for w in row.widths]
    axes.set_xticks(places, names, rotation=90, fontsize=7 if count <= 60 else 4)
    axes.set(ylabel="width")
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return figure


def _title(arm: str) -> str:
    return _clip(TITLES.get(arm, arm), 24)


def _clip(text: str, length: int = 60) -> str:
    return "\n".join(line if len(line) <= length else f"{line[: length - 3]}..." for line in text.split("\n"))
