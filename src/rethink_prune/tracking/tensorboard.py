"""TensorBoard event files of a study: one run per arm or detector, with tags that overlay them in one chart.

``accuracy top-1 by epoch/test`` counts epochs; ``accuracy top-1 by training GFLOPs/test`` counts the training GFLOPs
spent so far, ancestors included, so fine-tuning starts where the large network's training ended. Detectors have
``average precision mAP by ...``. The names are made by :func:`tag_name` alone.
"""

import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from rethink_prune.text import dotted_items

# TensorBoard sorts tags by name: what is tested comes before losses, and losses before the learning rate.
_MEASURES = {
    "top1": "accuracy top-1",
    "top5": "accuracy top-5",
    "map": "average precision mAP",
    "loss": "loss",
}
_AXES = {"epoch": "epoch", "gflops": "training GFLOPs"}


def tag_name(measure: str, axis: Literal["epoch", "gflops"]) -> str:
    """Return the name of a curve's tag, before the part of the images it is about.

    Examples
    --------
    >>> tag_name("top1", "epoch"), tag_name("loss", "gflops")
    ('accuracy top-1 by epoch', 'loss by training GFLOPs')
    """
    return f"{_MEASURES[measure]} by {_AXES[axis]}"


def gflops_step(flops: float) -> int:
    """Return a number of FLOPs as the step of an event.

    A step must be a whole number below 2**63, which single FLOPs would leave in long trainings.

    Examples
    --------
    >>> gflops_step(1.05e12)
    1050
    """
    return round(flops / 1e9)


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
            for name, measure in product(("test", "validation", "train"), _MEASURES):
                value = row.get(f"{name}_{measure}")
                if value is not None:
                    self._writer.add_scalar(f"{tag_name(measure, 'epoch')}/{name}", value, epoch)
                    if self._flops is not None:
                        by_flops = f"{tag_name(measure, 'gflops')}/{name}"
                        self._writer.add_scalar(by_flops, value, gflops_step(self._flops))
        self._written = len(rows)
        self._writer.flush()

    def write_picture(self, path: Path) -> None:
        """Write what a detector finds in a few test pictures, a PNG file."""
        from torchvision.io import ImageReadMode, decode_image

        self._writer.add_image("detections", decode_image(str(path), ImageReadMode.RGB), self._written)
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
