"""The paper's accuracies, from ``paper.yaml``, for the experiments that repeat its rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rethink_prune.report.statistics import SeedStatistics


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables.

    Attributes
    ----------
    epochs
        Of the unpruned network and of Scratch-E.
    note
        How the accuracies differ from what is compared with them.
    top1
        By arm; of the best epoch on the test images.
    """

    table: int
    epochs: int
    note: str | None
    top1: Mapping[str, SeedStatistics]


def paper_row(experiment: str | None, target: Mapping[str, Any]) -> PaperRow | None:
    """Return what the paper has for an experiment at a target; None if it has nothing.

    Examples
    --------
    >>> row = paper_row("l1_vgg16_cifar10", {"variant": "A"})
    >>> row.table, row.epochs, row.top1["scratch_b"]
    (1, 160, SeedStatistics(n=5, mean=93.78, sd=0.15))
    """
    table = _paper_tables().get(experiment, {"rows": []})
    for row in table["rows"]:
        if row["target"] == target:
            top1 = {arm: SeedStatistics(table["runs"], *value) for arm, value in row.items() if arm != "target"}
            return PaperRow(table["table"], table["epochs"], table.get("note"), top1)
    return None


@cache
def _paper_tables() -> Mapping[str | None, Any]:
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())
