"""What runs were made with beside their seed, and in which of these settings they differ."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.report.records import RunRecord, printable
from rethink_prune.text import dotted_items

# Runs named in a message; more are counted.
_MOST_NAMED = 3


def recorded_settings(run: RunRecord) -> dict[str, str]:
    """Return what a run's results depend on beside the seed, by dotted names, as far as it was recorded."""
    study = run.study
    settings = {printable(name): setting_text(value) for name, value in dotted_items(study.settings or {})}
    for name in ("precision", "train_images", "test_images"):
        settings[name] = setting_text(getattr(study, name))
    for arm, entry in run.trained.items():
        if entry.processes:
            settings[f"processes.{arm}"] = setting_text(list(entry.processes))
        if study.settings is None and arm in ("large", "finetune"):
            # An older version wrote names only; lengths tell at least some recipes apart.
            settings[f"epochs.{arm}"] = setting_text(entry.epochs)
    return settings


def setting_text(value: Any) -> str:
    """Return a setting's value in words.

    Examples
    --------
    >>> setting_text("sgd"), setting_text(None), setting_text([80, 120])
    ('sgd', 'null', '[80, 120]')
    """
    return printable(value if isinstance(value, str) else json.dumps(value))


def check_setting_names(names: Iterable[str], runs: Iterable[RunRecord]) -> None:
    """Raise `UserError` for the first name that no run has as a setting."""
    known = {name for run in runs for name in recorded_settings(run)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--by {unknown[0]}: no run has this setting; there are {', '.join(sorted(known))}")


def differing_settings(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Return the settings that differ, each with its values and runs in words.

    A setting that a run did not record agrees with any value.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for name, value in recorded_settings(run).items():
            found[name][value].append(run.name)
    return {
        name: f"{name} ({', '.join(f'{_shortened(value)} in {name_runs(names)}' for value, names in values.items())})"
        for name, values in found.items()
        if len(values) > 1
    }


def refuse_differing(differing: Mapping[str, str]) -> UserError:
    """Return the error for runs of one row whose settings differ, with the options that would help."""
    rows = " ".join(f"--by {name}" for name in differing)
    return UserError(
        f"these runs do not belong in one row: they differ in {'; '.join(differing.values())}. Name only those that "
        f"belong together, make rows of their own with {rows}, or mix them with --mix"
    )


def name_runs(names: Sequence[str]) -> str:
    """Return names of runs in words; from the fourth on they are counted.

    Examples
    --------
    >>> name_runs(["a", "b"]), name_runs(["a", "b", "c", "d"])
    ('a, b', 'a, b, c and 1 more')
    """
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shortened(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:20]}..."
