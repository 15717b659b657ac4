"""The picture of the gap between retraining and training from scratch over the length of training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

from rethink_prune.report.budget_axis import BudgetCurve, Question
from rethink_prune.report.crossover import Crossover, Place

# A colour, a marker and a line for each question, and where its points stand beside their length: intervals that lie
# on each other could not be told apart.
_LOOKS: dict[Question, tuple[str, str, str, float]] = {
    "training": ("#0072B2", "o", "-", 0.98),
    "total": ("#D55E00", "s", "--", 1.02),
}


def gap_figure(curves: Sequence[BudgetCurve], *, margin: float) -> Figure:
    """Draw the gaps of a row over the length of retraining, and below them the crossovers.

    Parameters
    ----------
    curves
        Those with a teacher get panels of their own.
    margin
        Points within which two arms count as equivalent: shaded.
    """
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure = Figure(figsize=(1.5 + 5.5 * len(kinds), 5), layout="constrained")
    panels = figure.subplots(2, len(kinds), sharex="col", sharey="row", squeeze=False, height_ratios=(6, 1))
    for kind, gaps, crossovers in zip(kinds, *panels, strict=True):
        _draw_panel(gaps, crossovers, [curve for curve in curves if curve.kind == kind], margin)
    panels[0, 0].set_ylabel(f"retrained minus from scratch, points of top-1\n(logarithmic beyond ±{2 * margin:g})")
    return figure


def _draw_panel(gaps: Axes, crossovers: Axes, curves: Sequence[BudgetCurve], margin: float) -> None:
    gaps.axhspan(-margin, margin, color="#BBBBBB", alpha=0.35, linewidth=0, label=f"equivalence margin, {margin:g}")
    gaps.axhline(0, color="black", linewidth=0.8)
    # Gaps of the shortest lengths can be a hundred times the margin.
    gaps.set_yscale("symlog", linthresh=2 * margin)
    gaps.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=2 * margin, subs=[1, 2, 5]))
    gaps.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lengths = sorted({point.epochs for curve in curves for point in curve.points})
    span = (lengths[0] / 1.25, lengths[-1] * 1.25)
    for place, curve in enumerate(curves):
        _draw_gaps(gaps, curve)
        if curve.crossover is not None:
            _draw_crossover(crossovers, curve.question, curve.crossover, span, place)
    gaps.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    crossovers.set_xscale("log")
    crossovers.set_xticks(lengths, [f"{length:.4g}" for length in lengths])
    crossovers.xaxis.set_minor_locator(NullLocator())
    crossovers.set(xlim=span, xlabel="N, epochs of retraining", ylim=(1.5, -0.5), ylabel="crossover")
    crossovers.set_yticks([])


def _draw_gaps(axes: Axes, curve: BudgetCurve) -> None:
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


def _draw_crossover(
    axes: Axes, question: Question, crossover: Crossover, span: tuple[float, float], place: int
) -> None:
    """Mark a crossover and its interval, to the picture's end where it goes on outside; a tick stands for a seed."""
    color = _LOOKS[question][0]

    def at(found: Place) -> float:
        return found if not isinstance(found, str) else span[0] if found == "below" else span[1]

    if crossover.interval is not None:
        axes.plot([at(end) for end in crossover.interval], [place, place], color=color, linewidth=6, alpha=0.3)
    seeds = [found for found in crossover.by_seed if found is not None and not isinstance(found, str)]
    axes.plot(seeds, [place] * len(seeds), linestyle="", marker="|", markersize=9, color=color)
    if not isinstance(crossover.place, str):
        axes.plot(crossover.place, place, color=color, marker="d", markersize=8)
