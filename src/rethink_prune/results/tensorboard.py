"""TensorBoard event files: one run per arm, with tags that overlay the arms of a study in one chart.

``top1/test`` and the like count epochs; ``top1_by_gflops/test`` counts the training GFLOPs spent so far, ancestors
included, so fine-tuning starts where the large network's training ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETS = ("test", "validation", "train")


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
                for measure in ("top1", "top5", "loss"):
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


def write_hparams(folder: Path, hparams: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write a study's hyper-parameters with its final metrics, for the HParams tab of a sweep."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    plain = {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in hparams.items()
    }
    writer = SummaryWriter(str(folder))
    writer.add_hparams(plain, dict(metrics), run_name=".")
    writer.close()


# What the "Custom scalars" tab shows: every arm of a study in one chart, by epoch and by computation.
_LAYOUT = {
    "Arms": {
        "top-1 by epoch": ["Multiline", ["^top1/test$"]],
        "top-1 by training GFLOPs": ["Multiline", ["^top1_by_gflops/test$"]],
        "training loss by epoch": ["Multiline", ["^loss/train$"]],
    }
}
