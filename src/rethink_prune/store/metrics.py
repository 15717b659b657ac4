"""A stage's ``metrics.csv``, one row an epoch; and the pace of a training, which the rows tell."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median_low

from rethink_prune.files import write_atomically

METRICS_FILE = "metrics.csv"


def write_metrics(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write all rows of a stage to its ``metrics.csv``.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_metrics(Path(folder), [{"epoch": 1, "loss": 0.25}])
    ...     read_metrics(Path(folder))
    [{'epoch': 1.0, 'loss': 0.25}]
    """
    if not rows:
        return
    text = io.StringIO()
    # The names of all rows: an earlier version may have begun the training, and written fewer columns.
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    # repr keeps every digit, so that files of equal runs are equal.
    writer.writerows({name: repr(value) for name, value in row.items()} for row in rows)
    write_atomically(folder / METRICS_FILE, text.getvalue().encode())


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a stage, without empty cells; no rows if it trained nothing."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def steady_pace(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Return the seconds that an epoch takes once the training runs steadily; None before two epochs are done.

    The first epoch is left out: a GPU starts, kernels are chosen, steps are recorded or compiled. Of the others the
    median is taken, and of two the lower one, because the first epoch after a stop is slow as well.

    Examples
    --------
    >>> rows = [{"seconds": 8.2}, {"seconds": 9.6}, {"seconds": 11.0}]
    >>> steady_pace(rows[:1]), round(steady_pace(rows), 2)
    (None, 1.4)
    """
    epochs = [after["seconds"] - before["seconds"] for before, after in pairwise(rows)]
    return median_low(epochs) if epochs else None
