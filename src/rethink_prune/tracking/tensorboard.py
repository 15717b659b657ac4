"""TensorBoard event files: one run per arm, with tags that overlay the arms of a study in one chart.

``top1/test`` and the like count epochs; ``top1_by_gflops/test`` counts the training GFLOPs spent so far, ancestors
included, so fine-tuning starts where the large network's training ended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rethink_prune.text import markdown

SETS = ("test", "validation", "train")
MEASURES = ("top1", "top5", "loss")
_LONGEST_NAME = 60  # of a folder; in bytes it may be four times as long


class ArmEvents:
    """Writes one arm's rows as they come.

    Parameters
    ----------
    folder : Path
        The arm's event folder; what is in it is replaced.
    flops_before : float or None
        Training FLOPs of the arm's ancestors; None if they are not known, and then nothing is plotted by FLOPs.
    flops_per_image : float
        Training FLOPs per image.
    """

    def __init__(self, folder: Path, *, flops_before: float | None, flops_per_image: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_custom_scalars(_LAYOUT)
        self._flops = flops_before
        self._per_image = flops_per_image
        self._written = 0

    def write(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write the rows that are new since the last call."""
        for row in rows[self._written :]:
            epoch = int(row["epoch"])
            self._writer.add_scalar("lr", row["lr"], epoch)
            if self._flops is not None:
                self._flops += self._per_image * row["images"]
            for name in SETS:
                for measure in MEASURES:
                    value = row.get(f"{name}_{measure}")
                    if value is None:
                        continue
                    self._writer.add_scalar(f"{measure}/{name}", value, epoch)
                    if self._flops is not None:
                        self._writer.add_scalar(f"{measure}_by_gflops/{name}", value, round(self._flops / 1e9))
        self._written = len(rows)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


def write_study(folder: Path, hparams: Mapping[str, Any], metrics: Mapping[str, float], table: str) -> None:
    """Write a study as one row of the HParams tab, and its table for the Text tab.

    Rows of all runs below one folder form one table, with the columns of all of them: it can be sorted by any.

    Parameters
    ----------
    folder : Path
        What is in it is replaced.
    hparams : mapping
        The configuration; parts of it become ``part.name``, what is None is left out.
    metrics : mapping of str to float
        The results.
    table : str
        In Markdown.
    """
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    # SummaryWriter.add_hparams would also list the columns, and TensorBoard then shows those of the first run alone.
    # An empty trial_id keeps runs with equal hyper-parameters apart.
    start = hparams_pb(dict(flatten(hparams)), trial_id="")
    with SummaryWriter(str(folder)) as writer:
        writer.file_writer.add_summary(start)
        for name, value in metrics.items():
            writer.add_scalar(name, value)
        writer.add_text("summary", table)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield the values of nested mappings by dotted name, as TensorBoard takes them; those that are None are left out.

    Examples
    --------
    >>> dict(flatten({"seed": 0, "recipe": {"lr": 0.1, "step": None, "milestones": (80, 120)}}))
    {'seed': 0, 'recipe.lr': 0.1, 'recipe.milestones': '(80, 120)'}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def write_aggregates(groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], folder: Path) -> None:
    """Write the mean, the least and the greatest top-1 over seeds, per arm and epoch.

    Every arm of every group becomes a run ``<group>/<arm>``. Its mean has the tag that single runs have
    (``top1/test``), so both show in one chart; the "Custom scalars" tab shows it in a band from least to greatest. An
    epoch counts if all seeds have reached it. The Text tab says how many seeds there are and where they ended.

    Parameters
    ----------
    groups : mapping of str to mapping of str to sequence of sequences
        By the group's label and the arm's name: of each seed the top-1 in percent after each epoch.
    folder : Path
        What is in it is replaced.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for number, (label, arms) in enumerate(groups.items()):
        # Labels can differ in what a folder's name cannot hold.
        group = _folder_name(label)
        group_folder = folder / (f"{group} ({number})" if (folder / group).exists() else group)
        ends = []
        for arm, seeds in arms.items():
            epochs = list(zip(*seeds, strict=False))
            with SummaryWriter(str(group_folder / _folder_name(arm))) as writer:
                writer.add_custom_scalars(_BAND)
                for epoch, values in enumerate(epochs, 1):
                    band = {"mean": fmean(values), "least": min(values), "greatest": max(values)}
                    writer.add_scalar("top1/test", band["mean"], epoch)
                    # Under other names as well: "Custom scalars" draws runs that have all three tags or none of them.
                    for kind, value in band.items():
                        writer.add_scalar(_band_tag(kind), value, epoch)
            if epochs:
                ends.append([arm, str(len(seeds)), str(len(epochs)), *(f"{value:.2f}" for value in band.values())])
        with SummaryWriter(str(group_folder)) as writer:
            writer.add_text("summary", markdown(["arm", "seeds", "epoch", "mean top-1 %", "least", "greatest"], ends))


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.,=+ -]+", "_", label)[:_LONGEST_NAME].strip(". ") or "_"


def _band_tag(kind: str) -> str:
    return f"seeds/top1_test_{kind}"


# What the "Custom scalars" tab shows: every arm of a study in one chart, by epoch and by computation.
_LAYOUT = {
    "Arms": {
        "top-1 by epoch": ["Multiline", ["^top1/test$"]],
        "top-1 by training GFLOPs": ["Multiline", ["^top1_by_gflops/test$"]],
        "training loss by epoch": ["Multiline", ["^loss/train$"]],
    }
}

_BAND = {
    "Seeds: mean, least and greatest": {
        "top-1 by epoch": ["Margin", [_band_tag(kind) for kind in ("mean", "least", "greatest")]]
    }
}
