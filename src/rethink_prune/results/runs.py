"""Finding the summaries of runs, and the table over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.results.tables import markdown

SUMMARY_FILE = "summary.json"


def find_summaries(places: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the summaries below the given folders, in the order of their paths.

    Parameters
    ----------
    places : iterable of Path
        Run folders, folders that hold some at any depth, or stores.

    Raises
    ------
    UserError
        If a folder is missing or holds no run, or a summary cannot be read.
    """
    files: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder")
        found = sorted(place.rglob(SUMMARY_FILE))
        for record in sorted(place.glob("runs/*.json")):
            summary = Path(json.loads(record.read_text())["run_dir"]) / SUMMARY_FILE
            found += [summary] if summary.is_file() else []
        if not found:
            raise UserError(f"{place}: holds no {SUMMARY_FILE}; give run folders, folders of runs, or a store")
        files.update(dict.fromkeys(path.resolve() for path in found))
    summaries = []
    for path in files:
        try:
            summaries.append(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error})") from None
    return summaries


def runs_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with one row per run: top-1 of the last epoch, per arm, and right after pruning."""
    arms = list(dict.fromkeys(arm for summary in summaries for arm in summary.get("arms", {})))
    columns = ["model", "dataset", "pruner", "recipe", "budget", "seed", "MACs kept", "unpruned", "pruned", *arms]
    rows = [
        [*_description(summary), *(_top1(summary.get("arms", {}).get(arm)) for arm in arms)] for summary in summaries
    ]
    return markdown(columns, rows)


def without_paths(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary that can be published: without the stages' folders."""
    return {
        name: without_paths(value) if isinstance(value, Mapping) else value
        for name, value in summary.items()
        if name != "stage"
    }


def _description(summary: Mapping[str, Any]) -> list[str]:
    study, large, pruned = summary["study"], summary.get("large"), summary.get("pruned")
    target = " ".join(f"{name}={value}" for name, value in study["target"].items())
    ledger = study.get("ledger")
    kept = f"{pruned['macs'] / ledger['macs_reference']:.1%}" if pruned and ledger else ""
    return [
        study["model"],
        study["dataset"],
        f"{study['pruner']} {target}",
        study["recipe"],
        study["budget"],
        str(study["seed"]),
        kept,
        _top1(large),
        f"{pruned['top1']:.2f}" if pruned and "top1" in pruned else "",
    ]


def _top1(entry: Mapping[str, Any] | None) -> str:
    if not entry:
        return ""
    return f"{entry['top1']:.2f}" if entry.get("status") == "done" else str(entry.get("status", ""))
