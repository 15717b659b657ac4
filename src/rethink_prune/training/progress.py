"""Where a training stands, and the bar that shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from rethink_prune.data.batches import Batches
from rethink_prune.turns import number_at_once

Row = dict[str, float]


@dataclass
class Progress:
    """Where a training stands; the part of a checkpoint that is not a network's, optimiser's or schedule's.

    Attributes
    ----------
    epoch, step : int
        Epochs that are complete, and batches done of the next one.
    seconds : float
        Time spent so far, runs that were stopped included.
    rows : list of dict
        One for every complete epoch: its line of ``metrics.csv``.
    totals : torch.Tensor
        Of the epoch that is not complete: summed loss and correct images (float64).
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def complete_epoch(self, row: Row) -> None:
        """Go to the start of the next epoch.

        Examples
        --------
        >>> progress = Progress(step=7)
        >>> progress.complete_epoch({"epoch": 1, "test_top1": 90.0})
        >>> progress.epoch, progress.step, progress.rows
        (1, 0, [{'epoch': 1, 'test_top1': 90.0}])
        """
        self.rows.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.totals = torch.zeros_like(self.totals)


@contextmanager
def progress_bar(progress: Progress, batches: Batches, *, epochs: int, title: str, shown: bool) -> Iterator[tqdm]:
    """Draw a bar that counts training images; lines of the log appear above it."""
    images = batches.images_per_epoch
    done = images * (progress.epoch + progress.step / batches.steps_per_epoch)
    bar = tqdm(
        total=epochs * images, initial=done, desc=title, unit="img", unit_scale=True, leave=False, disable=not shown
    )
    if not shown or number_at_once() > 1:
        with bar:
            yield bar
        return
    # Imported here: in a notebook, where no bar is shown, this warns of missing widgets.
    from tqdm.contrib.logging import logging_redirect_tqdm

    with bar, logging_redirect_tqdm():
        yield bar
