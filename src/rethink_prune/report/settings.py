"""What runs were made with beside their seed, and in which of these settings they differ."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rethink_prune.report.records import RunRecord, printable, value_text
from rethink_prune.text import dotted_items

# Runs named in a message; more are counted.
_MOST_NAMED = 3


def recorded_settings(run: RunRecord) -> dict[str, str]:
    """Return what a run's results depend on beside the seed, by dotted names, as far as it was recorded."""
    study = run.study
    settings = {printable(name): value_text(value) for name, value in dotted_items(study.settings or {})}
    # These are recorded beside the settings, as they turned out: `precision` may be asked for as `auto`.
    for name in ("precision", "train_images", "test_images"):
        settings[name] = value_text(getattr(study, name))
    for arm, entry in run.trained.items():
        if entry.processes:
            settings[f"processes.{arm}"] = value_text(list(entry.processes))
        if study.settings is None and arm in ("large", "finetune"):
            # An older version wrote names only; lengths tell at least some recipes apart.
            settings[f"epochs.{arm}"] = value_text(entry.epochs)
    return settings


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
