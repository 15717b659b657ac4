"""The picture of parameter efficiency: error over parameters and over MACs, a line a method."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from rethink_prune.report.efficiency import MEASURES, UNIFORM, EfficiencyCurves, Measure, MethodCurve
from rethink_prune.study.arms import Style

# Of Okabe and Ito's palette: told apart in black and white by dashes and markers.
_UNIFORM_STYLE = Style("#000000", "-", "s")
_STYLES = (
    Style("#0072B2", "--", "o"),
    Style("#D55E00", "-.", "^"),
    Style("#009E73", (0, (5, 1, 1, 1, 1, 1)), "D"),
    Style("#CC79A7", (0, (6, 2)), "v"),
    Style("#E69F00", (0, (3, 1)), "P"),
    Style("#56B4E9", (0, (9, 1)), "X"),
)


def efficiency_figure(curves: EfficiencyCurves) -> Figure:
    """Draw error over size in a panel for each measure that is known; the paper's curves are over parameters."""
    known = [m for m in MEASURES if any(size.measured(m) for method in curves.methods for size in method.sizes)]
    figure = Figure(figsize=(1.5 + 4.5 * len(known), 4.6), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    styles = _styles([*(m.method for m in curves.methods), *(line.method for line in curves.paper)])
    for axes, measure in zip(panels, known, strict=True):
        for method in curves.methods:
            _draw_method(axes, method, measure, styles[method.method])
        for line in curves.paper if measure == "params" else ():
            style, (sizes, errors) = styles[line.method], zip(*line.points, strict=True)
            label = f"{line.method}, figure {line.figure} (read from the figure)"
            axes.plot(sizes, errors, color=style.color, linestyle=":", marker=style.marker, alpha=0.5, label=label)
        axes.set(xlabel=MEASURES[measure], xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("test error (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _styles(methods: list[str]) -> dict[str, Style]:
    """Return a style for each name: uniform pruning is black, others come in their order."""
    others = [name for name in dict.fromkeys(methods) if name != UNIFORM]
    return {UNIFORM: _UNIFORM_STYLE} | {name: _STYLES[n % len(_STYLES)] for n, name in enumerate(others)}


def _draw_method(axes: Axes, curve: MethodCurve, measure: Measure, style: Style) -> None:
    places = [(place, size) for size in curve.sizes if (place := size.measured(measure))]
    if not places:
        return
    places.sort(key=lambda found: found[0])
    x, means = [place for place, _ in places], [size.error.mean for _, size in places]
    best, worst = [size.best for _, size in places], [size.worst for _, size in places]
    axes.fill_between(x, best, worst, color=style.color, alpha=0.15, linewidth=0)
    axes.plot(x, means, color=style.color, linestyle=style.dashes)
    # The legend has a filled marker, whichever there are.
    axes.plot([], [], color=style.color, linestyle=style.dashes, marker=style.marker, label=curve.method)
    for place, size in places:
        fill = style.color if measure in size.front else "white"
        axes.plot(place, size.error.mean, color=style.color, marker=style.marker, markerfacecolor=fill, zorder=3)
