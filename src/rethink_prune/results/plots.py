"""Pictures of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.results.metrics import read_metrics

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the dashes.
_STYLES = {
    "large": ("#000000", "-"),
    "finetune": ("#E69F00", "-"),
    "scratch_e": ("#56B4E9", "--"),
    "scratch_b": ("#0072B2", "-"),
    "large_longer": ("#999999", ":"),
}


def plot_curves(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw test top-1 over epochs and over training FLOPs, one line per arm and run.

    The right picture counts the FLOPs of what an arm builds on, so fine-tuning starts where the training of the large
    network ends.

    Parameters
    ----------
    summaries : sequence of mapping
        As :func:`~rethink_prune.results.runs.find_summaries` gives them; their stages must still be in the store.
    path : Path
        The picture's file; its ending gives the format.

    Raises
    ------
    UserError
        If no run has a finished arm with its stage still there, or the ending is not a picture's.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_epoch, by_flops = figure.subplots(1, 2, sharey=True)
    labelled: set[str] = set()
    for summary in summaries:
        entries = {"large": summary.get("large"), **summary.get("arms", {})}
        for name, entry in entries.items():
            rows = read_metrics(Path(entry["stage"])) if entry and entry["status"] == "done" else []
            if not rows or entry is None:
                continue
            color, dashes = _STYLES.get(name, ("#CC79A7", "-"))
            style = {"color": color, "linestyle": dashes, "label": None if name in labelled else name}
            labelled.add(name)
            top1 = [row["test_top1"] for row in rows]
            by_epoch.plot([row["epoch"] for row in rows], top1, **style)
            if entry.get("train_flops_total") is None:
                continue
            before = entry["train_flops_total"] - entry["train_flops"]
            per_epoch = entry["train_flops"] / len(rows)
            by_flops.plot([(before + per_epoch * row["epoch"]) / 1e12 for row in rows], top1, **style)
    if not labelled:
        raise UserError("no finished arm whose stage is still in its store: nothing to draw")
    by_epoch.set(xlabel="epoch", ylabel="test top-1 (%)")
    by_flops.set(xlabel="training TFLOPs, ancestors included")
    for axes in (by_epoch, by_flops):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_epoch.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise UserError(f"--plot {path}: {error}") from None
