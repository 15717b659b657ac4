"""A report's pictures: told apart with any colour vision, and in black and white by line style and marker."""

import io
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from rethink_prune.report.detection import DetectionRow, DetectionTable
from rethink_prune.report.efficiency_plot import efficiency_figure
from rethink_prune.report.gap_plot import gap_figure
from rethink_prune.report.networks import PRUNED, RECALIBRATED, network_label, split_name
from rethink_prune.report.patterns import KeptWidth, KernelPattern, LayerStage, RowPattern
from rethink_prune.report.remaining import Size, SizeSweep
from rethink_prune.report.results import ArmOverSeeds, Report, ResultRow, ResultTable
from rethink_prune.report.seed_curve import SeedCurve

PLOT_STYLE = Path(__file__).with_name("templates") / "plots.mplstyle"

# How the FLOPs of a search for widths are drawn, in grey or in the arm's colour.
_SEARCH: dict[str, Any] = {"color": "#555555", "linestyle": ":", "linewidth": 1, "marker": ">", "fillstyle": "none"}

# Of one picture: a higher one could not be looked at, nor at some point be drawn.
_MOST_DIFFERENCES = 100

# What each kind of picture shows, before the name of its row or table.
_CAPTIONS = {
    "gap": "Retraining against training from scratch over the length of retraining: the gap, paired by seed, with its "
    "pointwise 95 % interval; filled: shown after correction for all lengths. Below: where the gap reaches zero, with "
    "its interval and the seeds",
    "differences": "Difference to the arm named second, paired by seed, with its 95 % interval",
    "targets": "Top-1 after the last epoch against how much is pruned, mean and standard deviation over seeds",
    "remaining": "Top-1 after the last epoch over what remains of the unpruned network (logarithmic): mean and "
    "standard deviation over seeds; the line across: the unpruned network",
    "efficiency": "Error over size (logarithmic): mean over seeds, band from the best to the worst seed; filled: on "
    "the Pareto front of means; dotted: Liu et al. 2019, read from the figure, for orientation alone",
    "curves": "Top-1 during training: mean over seeds, band from the lowest to the highest seed",
    "ledger": "Where the training FLOPs of each arm went",
    "widths": "Width of each layer, kept and in full, in what is pruned: channels, single weights or blocks; mean and "
    "standard deviation over seeds. Dashed: the mean of a layer stage, the layers at one spatial size",
    "kernels": "Percent of the kernels that keep each position, averaged over the layers of a stage and over seeds",
    "detection_differences": "Difference of mAP to the detector named second, paired by seed, with its 95 % interval",
    "detection_curves": "mAP on the test pictures during training: mean over seeds, band from the lowest to the "
    "highest seed",
}


@dataclass(frozen=True)
class Picture:
    """A picture: its name in file names, what it shows, and its content as PNG and SVG; no SVG for a photograph."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def draw_pictures(report: Report, *, most: int | None = None) -> list[Picture]:
    """Draw all pictures of a report for which it has the numbers; with `most`, so many of tables and sweeps alone."""
    pictures = []
    with mpl.rc_context(fname=PLOT_STYLE):
        figures = (each for table in report.tables for each in _figures(table, report.margin, of_rows=most is None))
        for kind, slug, title, figure in islice(figures, most):
            pictures.append(save_figure(figure, f"{kind}-{slug}", f"{_CAPTIONS[kind]}: {title}"))
    return pictures


def draw_patterns(patterns: Sequence[RowPattern]) -> list[Picture]:
    """Draw what pruning leaves in each row."""
    with mpl.rc_context(fname=PLOT_STYLE):
        return [
            save_figure(figure, f"{kind}-{slug}", f"{_CAPTIONS[kind]}: {title}")
            for pattern in patterns
            for kind, slug, title, figure in _pattern_figures(pattern)
        ]


def save_figure(figure: Figure, name: str, caption: str) -> Picture:
    """Return a figure as a picture; call it under the style that the figure was drawn in."""
    png, svg = io.BytesIO(), io.BytesIO()
    # No version of matplotlib and no date in the files: the same report gives the same bytes.
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(name, caption, png.getvalue(), svg.getvalue())


def _figures(table: ResultTable, margin: float, *, of_rows: bool = True) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield each figure with its kind, the end of its file name, and the name of its row or table."""
    if any(comparison.difference for row in table.rows for comparison in row.comparisons):
        yield "differences", table.rows[0].slug.split("-")[0], table.title, _differences_figure(table.rows)
    sweeps: dict[str, list[ResultRow]] = defaultdict(list)
    for row in table.rows:
        sweeps[row.sweep].append(row)
    for found in table.sweeps:
        rows = sweeps[found.sweep]
        yield "remaining", rows[0].slug.split("-")[0], found.title, remaining_figure(found)
    for number, curves in enumerate(table.efficiency, 1):
        slug = f"{table.rows[0].slug.split('-')[0]}-{number}"
        yield "efficiency", slug, curves.title, efficiency_figure(curves)
    for sweep, rows in sweeps.items():
        if len(rows) > 1 and sweep not in {found.sweep for found in table.sweeps}:
            yield "targets", rows[0].slug.split("-")[0], sweep, _targets_figure(rows)
    for row in table.rows if of_rows else ():
        if row.curves:
            yield "gap", row.slug, row.title, gap_figure(row.curves, margin=margin)
        if drawn := [result for result in row.arms if result.curve is not None]:
            yield "curves", row.slug, row.title, _curves_figure(drawn, row.on_axis)
        if trained := [result for result in row.arms if result.flops_total is not None]:
            yield "ledger", row.slug, row.title, _ledger_figure(trained)
        yield from _pattern_figures(row)
    for detection in table.detection:
        yield from _detection_figures(detection)


def _detection_figures(detection: DetectionTable) -> Iterator[tuple[str, str, str, Figure]]:
    rows = detection.rows
    if any(comparison.difference for row in rows for comparison in row.comparisons):
        # The number of the first row, as for arms, and that of the detection data set.
        first, *_, last = rows[0].slug.split("-")
        figure = _differences_figure(rows, "points of mAP")
        yield "detection_differences", f"{first}-{last}", detection.title, figure
    for row in rows:
        if drawn := [ArmOverSeeds(each.entry, None, curve=each.curve) for each in row.detectors if each.curve]:
            figure = _curves_figure(drawn, measure="test mAP (%)")
            yield "detection_curves", row.slug, f"{row.title}, {detection.title}", figure


def detection_pictures(report: Report, files: Mapping[str, Path]) -> list[Picture]:
    """Return what detectors found in a few test pictures: of each, one seed whose picture is there.

    Parameters
    ----------
    files
        PNG files by stage.
    """
    pictures = []
    for row in (row for table in report.tables for detection in table.detection for row in detection.rows):
        for found in row.detectors:
            seed, file = next(((s, files[stage]) for s, stage in found.stages if stage in files), (0, None))
            png = file.read_bytes() if file is not None else b""
            # The page shows what it is given; a summary may name any folder.
            if png.startswith(b"\x89PNG"):
                name, slug = network_label(found.entry).name, re.sub(r"[^a-z0-9]+", "_", found.entry.lower())
                caption = f"What the detector of {name} finds in test pictures, seed {seed}: {row.title}"
                pictures.append(Picture(f"detections-{row.slug}-{slug}", caption, png, b""))
    return pictures


def _pattern_figures(row: ResultRow | RowPattern) -> Iterator[tuple[str, str, str, Figure]]:
    if row.widths:
        yield "widths", row.slug, row.title, _widths_figure(row.widths, row.stages)
    if row.kernels:
        yield "kernels", row.slug, row.title, _kernels_figure(row.kernels)


def _curves_figure(
    results: Sequence[ArmOverSeeds], on_axis: Collection[str] = (), *, measure: str = "test top-1 (%)"
) -> Figure:
    """Draw each network's training; arms that are compared over lengths have one entry a family in the legend."""
    families: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.arm in on_axis:
            families[split_name(result.arm)[0]].append(result.arm)
    titles = {names[0]: network_label(names[0]).title.partition(" @")[0] for names in families.values()}
    labels = {names[0]: f"{titles[names[0]]}, {len(names)} lengths" for names in families.values()}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_epoch, by_flops = figure.subplots(1, 2, sharey=True)
    for result in results:
        curve = result.curve
        assert curve is not None
        label = labels.get(result.arm, "_") if result.arm in on_axis else _short_title(result.arm)
        _draw_curve(by_epoch, result.arm, curve, curve.epoch, clip(label, 32))
        if curve.flops is not None:
            _draw_curve(by_flops, result.arm, curve, curve.flops, label)
            _draw_search(by_flops, result, curve.flops[-1], curve.mean[-1])
    by_epoch.set(xlabel="epoch", ylabel=measure)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_flops.set(xlabel="training FLOPs, ancestors included")
    by_flops.xaxis.set_major_formatter(EngFormatter())
    by_epoch.legend(frameon=False)
    if any(result.search_flops for result in results):
        by_flops.legend([Line2D([], [], **_SEARCH)], ["with the search for the widths"], frameon=False)
    return figure


def _draw_curve(axes: Axes, arm: str, curve: SeedCurve, x: Sequence[float], label: str) -> None:
    axes.fill_between(x, curve.low, curve.high, color=network_label(arm).style.color, alpha=0.2, linewidth=0)
    every = max(1, len(x) // 8)
    # The last epoch is among the marked ones: it is the one that counts.
    marked = ((len(x) - 1) % every, every)
    axes.plot(x, curve.mean, **_line_style(arm), markersize=4, markevery=marked, label=label)


def _draw_search(axes: Axes, result: ArmOverSeeds, end: float, top1: float) -> None:
    """Mark where an arm ends if the trainings count that found the pruned network's widths."""
    if result.search_flops:
        color = network_label(result.arm).style.color
        axes.plot([end, end + result.search_flops], [top1, top1], markevery=[1], **{**_SEARCH, "color": color})


def _targets_figure(rows: Sequence[ResultRow]) -> Figure:
    """Draw accuracies against the target where it is a number, else against the MACs that are kept."""
    # One axis fits only targets of one kind, such as ratios.
    names = {row.target and row.target[0] for row in rows}
    name = names.pop() if len(names) == 1 else None
    places = [row.target[1] if name and row.target else row.macs_kept and row.macs_kept.mean for row in rows]
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    # Accuracies right after pruning are so low that they would flatten all the others.
    aside = {PRUNED, RECALIBRATED, *(arm for row in rows for arm in row.on_axis)}
    for arm in dict.fromkeys(result.arm for row in rows for result in row.arms if result.arm not in aside):
        points = [(place, result.top1) for place, row in zip(places, rows, strict=True) if (result := row.arm(arm))]
        known = sorted((x, top1.mean, top1.sd or 0) for x, top1 in points if x is not None and top1 is not None)
        if known:
            x, mean, sd = zip(*known, strict=True)
            axes.errorbar(x, mean, yerr=sd, capsize=3, label=_short_title(arm), markersize=5, **_line_style(arm))
    axes.set(xlabel=name or "MACs kept (%)", ylabel="test top-1 (%)")
    axes.legend(frameon=False)
    return figure


def remaining_figure(sweep: SizeSweep) -> Figure:
    """Draw accuracies over what remains: panels for one cut and for rounds, over parameters and over MACs."""
    cuts = list(dict.fromkeys(size.in_rounds for size in sweep.sizes))
    measures = {
        name: shares
        for name, shares in (
            ("parameters", [size.params_kept for size in sweep.sizes]),
            ("MACs", [size.macs_kept for size in sweep.sizes]),
        )
        if any(shares)
    }
    figure = Figure(figsize=(1.5 + 4.5 * len(measures), 0.8 + 3.2 * len(cuts)), layout="constrained")
    panels = figure.subplots(len(cuts), len(measures), sharex="col", sharey=True, squeeze=False)
    for row, in_rounds in zip(panels, cuts, strict=True):
        for axes, shares in zip(row, measures.values(), strict=True):
            found = zip(sweep.sizes, shares, strict=True)
            _draw_sizes(axes, sweep, [(k.mean, size) for size, k in found if k and size.in_rounds == in_rounds])
        row[0].set_ylabel(f"{'in rounds' if in_rounds else 'one cut'}\ntest top-1 (%)")
    for axes, (name, shares) in zip(panels[-1], measures.items(), strict=True):
        axes.set(xlabel=f"{name} that remain (%)", xscale="log")
        ticks = _spread_ticks([share.mean for share in shares if share])
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.invert_xaxis()
    drawn = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw_sizes(axes: Axes, sweep: SizeSweep, places: Sequence[tuple[float, Size]]) -> None:
    if sweep.unpruned is not None:
        level, sd = sweep.unpruned.mean, sweep.unpruned.sd or 0
        axes.axhspan(level - sd, level + sd, color="#BBBBBB", alpha=0.35, linewidth=0)
        style = network_label("large").style
        axes.axhline(level, color=style.color, linestyle=style.dashes, label=_short_title("large"))
    for arm in sweep.arms:
        found = sorted((place, top1.mean, top1.sd or 0) for place, size in places if (top1 := size.top1.get(arm)))
        if found:
            x, mean, spread = zip(*found, strict=True)
            axes.errorbar(x, mean, yerr=spread, capsize=3, label=_short_title(arm), markersize=5, **_line_style(arm))


def _spread_ticks(places: Sequence[float]) -> list[float]:
    """Return places from the largest on, without those whose labels would lie on each other.

    Examples
    --------
    >>> _spread_ticks([50.0, 51.2, 80.0])
    [80.0, 51.2]
    """
    ticks: list[float] = []
    for place in sorted(places, reverse=True):
        if not ticks or place < 0.92 * ticks[-1]:
            ticks.append(place)
    return ticks


def _differences_figure(rows: Sequence[ResultRow | DetectionRow], measure: str = "points of top-1") -> Figure:
    found = [(row, c, c.difference) for row in rows for c in row.comparisons if c.difference is not None]
    shown = found[:_MOST_DIFFERENCES]
    figure = Figure(figsize=(7.5, 1 + 0.55 * len(shown)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for y, (row, comparison, difference) in enumerate(shown):
        labels.append(f"{_short_title(comparison.first)} minus {_short_title(comparison.second)}\n{row.title}")
        style = network_label(comparison.first).style
        low, high = difference.interval or (difference.mean, difference.mean)
        error = [[difference.mean - low], [high - difference.mean]]
        axes.errorbar(difference.mean, y, xerr=error, color=style.color, marker=style.marker, capsize=4)
    if len(found) > len(shown):
        axes.set_title(f"the first {len(shown)} of {len(found):,}; the table has all", fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [clip(label) for label in labels], fontsize=8)
    # The first row of the table is at the top.
    axes.set(xlabel=measure, ylim=(len(shown) - 0.5, -0.5))
    return figure


def _ledger_figure(results: Sequence[ArmOverSeeds]) -> Figure:
    figure = Figure(figsize=(6.5, 1.2 + 0.4 * len(results)), layout="constrained")
    axes = figure.subplots()
    parts = [(result.flops_before, result.train_flops, result.search_flops) for result in results]
    before, own, search = np.array(parts, dtype=float).T
    places = range(len(results))
    # Hatched, so that the two parts differ in black and white too.
    axes.barh(places, before, color="#BBBBBB", edgecolor="black", hatch="//", label="what it starts from")
    axes.barh(places, own, left=before, color="#0072B2", edgecolor="black", label="its own training")
    if search.any():
        ends = before + own
        axes.barh(
            places, search, left=ends, color="white", edgecolor="black", hatch="..", label="search for the widths"
        )
    axes.set_yticks(places, [_short_title(result.arm) for result in results])
    axes.invert_yaxis()
    axes.set(xlabel="training FLOPs, mean over seeds")
    axes.xaxis.set_major_formatter(EngFormatter())
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure


def _widths_figure(widths: Sequence[KeptWidth], stages: Sequence[LayerStage] = ()) -> Figure:
    count = len(widths)
    figure = Figure(figsize=(min(16.0, max(5.0, 1.5 + 0.28 * count)), 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(count)
    axes.bar(places, [w.full for w in widths], color="white", edgecolor="black", hatch="..", label="in full")
    spread = [w.sd or 0 for w in widths]
    axes.bar(places, [w.kept for w in widths], yerr=spread, capsize=2, color="#0072B2", edgecolor="black", label="kept")
    for stage in stages:
        inside = [place for place, width in zip(places, widths, strict=True) if width.size == stage.size]
        first, last, mean = inside[0], inside[-1], stage.width.mean
        axes.plot((first - 0.5, last + 0.5), (mean, mean), color="#D55E00", linestyle="--", linewidth=2)
        axes.annotate(stage.size, ((first + last) / 2, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    # Names of layers can be as long as the picture is high.
    names = [clip(w.layer, 30) for w in widths]
    axes.set_xticks(places, names, rotation=90, fontsize=7 if count <= 60 else 4)
    axes.set(ylabel="width")
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return figure


def _kernels_figure(patterns: Sequence[KernelPattern]) -> Figure:
    """Draw a map for each layer stage and size of kernels, all on one scale; small ones have their numbers."""
    figure = Figure(figsize=(1.5 + 2.2 * len(patterns), 3.0), layout="constrained")
    panels = figure.subplots(1, len(patterns), squeeze=False)[0]
    # From nothing up: a scale of their own would make much of a small difference.
    most = max(value for pattern in patterns for line in pattern.kept for value in line)
    image = None
    for axes, pattern in zip(panels, patterns, strict=True):
        kept = 100 * np.array(pattern.kept)
        image = axes.imshow(kept, cmap="cividis", vmin=0, vmax=100 * most or 1)
        axes.set_title(f"{pattern.size or 'all layers'}\n{pattern.layers} layers, {pattern.kernel}", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for (row, column), value in np.ndenumerate(kept) if kept.size <= 25 else ():
            color = "black" if value > 60 * most else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="kernels that keep it (%)")
    return figure


def _line_style(arm: str) -> dict[str, Any]:
    style = network_label(arm).style
    return {"color": style.color, "linestyle": style.dashes, "marker": style.marker}


def _short_title(arm: str) -> str:
    return clip(network_label(arm).title, 24)


def clip(text: str, length: int = 60) -> str:
    """Return a text whose lines have at most `length` characters; dots stand for what is left out.

    Examples
    --------
    >>> clip("layer1.0.conv1", 10)
    'layer1....'
    """
    return "\n".join(line if len(line) <= length else f"{line[: length - 3]}..." for line in text.split("\n"))
