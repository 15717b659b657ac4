"""The picture of a sensitivity scan: top-1 over the ratio, a line for each layer, coloured in network order."""

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from rethink_prune.finished.sensitivity import SensitivityScan
from rethink_prune.report.plots import PLOT_STYLE, Picture, clip, save_figure

# The end of the colour map is too light to be seen on white.
_LIGHTEST = 0.9
# Names that fit beside the colour bar, one above the other.
_MOST_NAMES = 60


def draw_sensitivity(found: SensitivityScan) -> Picture:
    """Draw a scan in two panels: as pruned, and with statistics estimated anew."""
    title = f"{found.network} on {found.dataset}, {found.pruner['name']}, each layer pruned alone, not retrained"
    with mpl.rc_context(fname=PLOT_STYLE):
        return save_figure(_scan_figure(found, title), "sensitivity", title)


def _scan_figure(found: SensitivityScan, title: str) -> Figure:
    names, count = list(found.layers), len(found.layers)
    figure = Figure(figsize=(10.5, min(8.0, max(4.0, 1.2 + 0.125 * count))), layout="constrained")
    pruned, recalibrated = figure.subplots(1, 2, sharex=True)
    colors = _layer_colors(count)
    _draw_layers(pruned, found, "top1", found.top1, colors)
    _draw_layers(recalibrated, found, "top1_recalibrated", found.top1_recalibrated, colors)
    pruned.set(title="as pruned", ylabel="test top-1 (%)")
    # On one scale with what stale statistics cost, differences between layers could not be seen here.
    recalibrated.set(title="batch-norm statistics re-estimated (own scale)")
    figure.suptitle(clip(title, 110), fontsize=11)
    figure.supxlabel("share of the layer that is removed", fontsize=10)
    norm = BoundaryNorm([place - 0.5 for place in range(count + 1)], count)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=[pruned, recalibrated], pad=0.01)
    every = -(-count // _MOST_NAMES)
    shown = range(0, count, every)
    bar.set_ticks(list(shown), labels=[clip(names[place], 30) for place in shown], fontsize=8 if count <= 30 else 6)
    bar.ax.tick_params(length=0, which="both")
    # The first layer is at the top.
    bar.ax.invert_yaxis()
    return figure


def _layer_colors(count: int) -> list[tuple[float, float, float, float]]:
    step = _LIGHTEST / max(1, count - 1)
    return [mpl.colormaps["viridis"](place * step) for place in range(count)]


def _draw_layers(
    axes: Axes, found: SensitivityScan, value: str, unpruned: float, colors: list[tuple[float, float, float, float]]
) -> None:
    axes.axhline(unpruned, color="black", linewidth=0.8, linestyle="--", label="unpruned")
    for rows, color in zip(found.layers.values(), colors, strict=True):
        ratios, top1 = [row.ratio for row in rows], [getattr(row, value) for row in rows]
        axes.plot([0, *ratios], [unpruned, *top1], color=color, marker="o", markersize=3, linewidth=1.2)
    # Neighbours of a colour map are hard to tell apart: the layer that matters most has its name at its line.
    lowest = min(found.layers.values(), key=lambda rows: getattr(rows[-1], value))[-1]
    end = (lowest.ratio, getattr(lowest, value))
    axes.annotate(clip(lowest.layer, 30), end, (-6, 0), textcoords="offset points", ha="right", va="top", fontsize=8)
    axes.legend(frameon=False, loc="lower left")
