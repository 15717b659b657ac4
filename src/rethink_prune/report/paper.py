"""The paper's accuracies, from ``paper.yaml``, for the experiments that repeat its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rethink_prune.report.statistics import Sample


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables.

    Attributes
    ----------
    table : int
    epochs : int
        Of the unpruned network and of Scratch-E.
    note : str or None
        How the accuracies differ from what is compared with them.
    top1 : mapping of str to Sample
        By arm; of the best epoch on the test images.
    """

    table: int
    epochs: int
    note: str | None
    top1: Mapping[str, Sample]


def paper_row(experiment: str | None, target: Mapping[str, Any]) -> PaperRow | None:
    """Return what the paper has for an experiment at a target such as ``{"ratio": 0.7}``; None if it has nothing."""
    table = _tables().get(experiment)
    if table is None:
        return None
    for row in table["rows"]:
        if row["target"] == target:
            top1 = {
                arm: Sample(table["runs"], value[0], value[1] if len(value) > 1 else None)
                for arm, value in row.items()
                if arm != "target"
            }
            return PaperRow(table["table"], table["epochs"], table.get("note"), top1)
    return None


@cache
def _tables() -> Mapping[str | None, Any]:
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())
