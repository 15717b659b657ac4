"""A stage's ``metrics.csv``: one row an epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rethink_prune.files import write_atomically

METRICS_FILE = "metrics.csv"


def write_metrics(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write all rows; numbers keep every digit, so that files of equal runs are equal."""
    if not rows:
        return
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # an earlier version may have begun with fewer
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: repr(value) for name, value in row.items()} for row in rows)
    write_atomically(folder / METRICS_FILE, text.getvalue().encode())


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a stage; none if it trained nothing."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
