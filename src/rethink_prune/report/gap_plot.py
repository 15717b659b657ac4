"""The picture of the gap between retraining and training from scratch over the length of training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from rethink_prune.report.budget_axis import BudgetCurve, Question
from rethink_prune.report.crossover import Crossover, Place

# A colour, a marker and a line for each question, and where its points stand beside their length: intervals that lie
# on each other could not be told apart.
_LOOKS: dict[Question, tuple[str, str, str, float]] = {
    "training": ("#0072B2", "o", "-", 0.98),
    "total": ("#D55E00", "s", "--", 1.02),
}


def gap_figure(curves: Sequence[BudgetCurve], *, margin: float) -> Figure:
    """Draw the gaps of a row over the length of retraining, a panel for each kind of arms.

    Parameters
    ----------
    margin
        Points within which two arms count as equivalent: shaded.
    """
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure = Figure(figsize=(1 + 5.5 * len(kinds), 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        _draw_panel(axes, [curve for curve in curves if curve.kind == kind], margin)
    panels[0].set_ylabel("retrained minus from scratch, points of top-1")
    return figure


def _draw_panel(axes: Axes, curves: Sequence[BudgetCurve], margin: float) -> None:
    axes.set_xscale("log")
    axes.axhspan(-margin, margin, color="#BBBBBB", alpha=0.35, linewidth=0, label=f"equivalence margin, {margin:g}")
    axes.axhline(0, color="black", linewidth=0.8)
    lengths = sorted({point.epochs for curve in curves for point in curve.points})
    span = (lengths[0] / 1.25, lengths[-1] * 1.25)
    for curve in curves:
        _draw_curve_of_gaps(axes, curve)
        if curve.crossover is not None:
            _draw_crossover(axes, curve.question, curve.crossover, span)
    axes.set_xticks(lengths, [f"{length:.4g}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlim=span, xlabel="N, epochs of retraining")
    axes.legend(frameon=False, fontsize=8)


def _draw_curve_of_gaps(axes: Axes, curve: BudgetCurve) -> None:
    color, marker, line, beside = _LOOKS[curve.question]
    found = [(point.epochs * beside, d, point) for point in curve.points if (d := point.comparison.difference)]
    x, means = np.array([place for place, _, _ in found]), np.array([d.mean for _, d, _ in found])
    ends = np.array([d.interval or (d.mean, d.mean) for _, d, _ in found])
    error = [means - ends[:, 0], ends[:, 1] - means]
    axes.errorbar(x, means, yerr=error, color=color, linestyle=line, capsize=4, label=curve.title)
    # Filled: shown after correction for all lengths.
    survives = np.array([point.survives for _, _, point in found])
    for chosen, fill in ((survives, color), (~survives, "white")):
        axes.plot(x[chosen], means[chosen], linestyle="", marker=marker, color=color, markerfacecolor=fill)


def _draw_crossover(axes: Axes, question: Question, crossover: Crossover, span: tuple[float, float]) -> None:
    """Mark the crossover at the lower edge, with its interval: to the picture's end where it goes on outside."""
    color, _, line, _ = _LOOKS[question]
    height = 0.03 if question == "training" else 0.07
    across = axes.get_xaxis_transform()

    def at(place: Place) -> float:
        return place if not isinstance(place, str) else span[0] if place == "below" else span[1]

    if crossover.interval is not None:
        ends = [at(end) for end in crossover.interval]
        axes.plot(ends, [height, height], transform=across, color=color, linewidth=4, alpha=0.4, solid_capstyle="butt")
    if not isinstance(crossover.place, str):
        axes.plot(crossover.place, height, transform=across, color=color, marker="d", markersize=8)
        axes.axvline(crossover.place, color=color, linestyle=line, linewidth=0.8, alpha=0.6)
