"""Print one row per pruner over the seeds of a sweep.

    python table.py RESULTS.json

RESULTS.json is what ``python -m rethink_prune.report ... --json`` wrote. Mean (standard deviation) of the top-1 of the
last epoch, in percent.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rethink_prune.results.tables import markdown

ARMS = {"finetune": "fine-tuned", "scratch_e": "Scratch-E", "scratch_b": "Scratch-B"}


def spread(values: list[float]) -> str:
    """Return mean and standard deviation of values, one per seed."""
    return f"{mean(values):.2f}" + (f" ({stdev(values):.2f})" if len(values) > 1 else "")


def row(title: str, runs: list[dict[str, Any]], arms: list[str]) -> list[str]:
    """Return the cells of one pruner."""
    kept = [100 * run["pruned"]["macs"] / run["large"]["macs"] for run in runs]
    trained = [[run["arms"][arm]["top1"] for run in runs] for arm in arms]
    columns = [kept, [run["large"]["top1"] for run in runs], [run["pruned"]["top1"] for run in runs], *trained]
    return [title, str(len(runs)), *map(spread, columns)]


def main() -> None:
    """Print the table of the file named on the command line."""
    studies: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        target = " ".join(f"{name}={value:.3g}" for name, value in run["study"]["target"].items())
        studies[f"{run['study']['pruner']}, {target}"].append(run)
    arms = [arm for arm in ARMS if all(arm in run["arms"] for runs in studies.values() for run in runs)]
    columns = ["pruner", "n", "MACs kept, %", "unpruned", "right after pruning", *(ARMS[arm] for arm in arms)]
    print(markdown(columns, [row(title, runs, arms) for title, runs in studies.items()]))


if __name__ == "__main__":
    main()
