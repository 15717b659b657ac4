"""TensorBoard event files: one run per arm, with tags that overlay the arms of a study, or of many, in one chart.

``top1/test`` and the like count epochs; ``top1_by_gflops/test`` counts the training GFLOPs spent so far, ancestors
included, so fine-tuning starts where the large network's training ended.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rethink_prune.text import dotted_items, markdown

# What the "Custom scalars" tab shows: every arm of a study in one chart, by epoch and by computation.
_LAYOUT = {
    "Arms": {
        "top-1 by epoch": ["Multiline", ["^top1/test$"]],
        "top-1 by training GFLOPs": ["Multiline", ["^top1_by_gflops/test$"]],
        "training loss by epoch": ["Multiline", ["^loss/train$"]],
    }
}
_LONGEST_NAME = 60  # of a folder; in bytes it may be four times as long

# Under names of their own: "Custom scalars" draws runs that have all three tags or none of them.
_BAND_TAGS = {kind: f"seeds/top1_test_{kind}" for kind in ("mean", "least", "greatest")}
_BAND = {"Seeds: mean, least and greatest": {"top-1 by epoch": ["Margin", list(_BAND_TAGS.values())]}}


class ArmEvents:
    """Write one arm's rows as they come.

    Parameters
    ----------
    folder
        The arm's event folder; what is in it is replaced.
    flops_before
        Training FLOPs of the arm's ancestors; None if they are not known, and then nothing is plotted by FLOPs.
    flops_per_image
        Training FLOPs per image.
    """

    def __init__(self, folder: Path, *, flops_before: float | None, flops_per_image: float) -> None:
        # Imported here: it is slow to import, and not everything that imports this file writes events.
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_custom_scalars(_LAYOUT)
        self._flops = flops_before
        self._per_image = flops_per_image
        self._written = 0

    def write(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write the rows that are new since the last call; `rows` are all so far, one an epoch."""
        for row in rows[self._written :]:
            epoch = int(row["epoch"])
            self._writer.add_scalar("lr", row["lr"], epoch)
            if self._flops is not None:
                self._flops += self._per_image * row["images"]
            for name, measure in product(("test", "validation", "train"), ("top1", "top5", "loss")):
                value = row.get(f"{name}_{measure}")
                if value is not None:
                    self._writer.add_scalar(f"{measure}/{name}", value, epoch)
                    if self._flops is not None:
                        # A step must be a whole number below 2**63, which single FLOPs would leave in long trainings.
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
    folder
        What is in it is replaced.
    hparams
        The configuration; parts of it become ``part.name``, what is None is left out.
    metrics
        The results, by tag.
    table
        In Markdown.
    """
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    chosen = ((name, value) for name, value in dotted_items(hparams) if value is not None)
    shown = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in chosen}
    with SummaryWriter(str(folder)) as writer:
        # SummaryWriter.add_hparams would also list the columns, and TensorBoard then shows those of the first run
        # alone. An empty trial_id keeps runs with equal hyper-parameters apart.
        writer.file_writer.add_summary(hparams_pb(shown, trial_id=""))
        for name, value in metrics.items():
            writer.add_scalar(name, value)
        writer.add_text("summary", table)


def write_seed_curves(groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], folder: Path) -> None:
    """Write the mean, the least and the greatest top-1 over seeds, per arm and epoch.

    Every arm of every group becomes a run ``<group>/<arm>``. Its mean has the tag that single runs have
    (``top1/test``), so both show in one chart; the "Custom scalars" tab shows it in a band from least to greatest. An
    epoch counts if all seeds have reached it. The Text tab says how many seeds there are and where they ended.

    Parameters
    ----------
    groups
        By the group's label and the arm's name: of each seed the top-1 in percent after each epoch.
    folder
        What is in it is replaced.
    """
    # Importing it loads torch.
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for number, (label, arms) in enumerate(groups.items()):
        group = _folder_name(label)
        # Labels can differ in what a folder's name cannot hold.
        group_folder = folder / (f"{group} ({number})" if (folder / group).exists() else group)
        ends = []
        for arm, seeds in arms.items():
            # Without `strict`, zip ends with the shortest seed.
            epochs = [(fmean(values), min(values), max(values)) for values in zip(*seeds, strict=False)]
            with SummaryWriter(str(group_folder / _folder_name(arm))) as writer:
                writer.add_custom_scalars(_BAND)
                for epoch, band in enumerate(epochs, 1):
                    for tag, value in zip(("top1/test", *_BAND_TAGS.values()), (band[0], *band), strict=True):
                        writer.add_scalar(tag, value, epoch)
            if epochs:
                ends.append([arm, str(len(seeds)), str(len(epochs)), *(f"{value:.2f}" for value in epochs[-1])])
        with SummaryWriter(str(group_folder)) as writer:
            writer.add_text("summary", markdown(["arm", "seeds", "epoch", "mean top-1 %", "least", "greatest"], ends))


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.,=+ -]+", "_", label)[:_LONGEST_NAME].strip(". ") or "_"
