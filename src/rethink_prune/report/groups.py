"""Which runs belong together: one group is one row of a table, its runs differ in nothing but the seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.report.runs import Pruned, Run, Trained, printable

# Runs named in a message; more are counted.
_NAMED = 3
# What follows from the place a run was made in, and may change results within float tolerance.
_CIRCUMSTANCES = ("device", "torch", "rethink-prune")


@dataclass(frozen=True)
class Group:
    """Runs of one study, one for each seed.

    Attributes
    ----------
    target : str
        How much the pruner was told to remove, in words.
    by : tuple of (str, str)
        Settings that this group was told to differ from others in, with its values.
    runs : tuple of Run
    notes : tuple of str
        What a reader of the row has to know.
    """

    dataset: str
    model: str
    pruner: str
    target: str
    recipe: str
    budget: str
    by: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...]

    @property
    def experiment(self) -> str | None:
        """The experiment file the runs were made with, if it is one."""
        names = {run.study.experiment for run in self.runs if run.study.experiment}
        return names.pop() if len(names) == 1 else None


def group_runs(runs: Sequence[Run], *, by: Sequence[str] = (), mix: bool = False) -> list[Group]:
    """Put runs into groups by data set, network, pruner, target, recipe and budget, and merge what is one run.

    Parameters
    ----------
    runs : sequence of Run
    by : sequence of str
        Further settings to keep apart, such as ``recipe.lr``: a group for each value.
    mix : bool
        Put runs into one group though their settings differ under the same names.

    Raises
    ------
    UserError
        If settings differ within a group and `mix` is off, if one seed has two results, or if `by` names a setting
        that no run has. All such reasons in one message, a line each.
    """
    settings = {id(run): _settings(run) for run in runs}
    _check_by(by, settings.values())
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        study = run.study
        values = tuple((name, settings[id(run)].get(name, "not recorded")) for name in by)
        target = _target(study.target)
        found[study.dataset, study.model, study.pruner, target, study.recipe, study.budget, values].append(run)
    groups, refused = [], []
    for key, members in sorted(found.items(), key=lambda item: _natural(item[0])):
        dataset, model, pruner, target, recipe, budget, values = key
        try:
            merged, notes = _merged([(run, settings[id(run)]) for run in members], mix=mix)
        except UserError as error:
            refused.append(f"{model}, {pruner} {target} ({dataset}, {recipe} recipe, {budget} budget): {error}")
        else:
            groups.append(Group(dataset, model, pruner, target, recipe, budget, values, tuple(merged), tuple(notes)))
    if refused:
        raise UserError("\n".join(refused))
    return groups


def _settings(run: Run) -> dict[str, str]:
    """Return what a run's results depend on beside the seed, by dotted names, as far as it was recorded."""
    study = run.study
    settings = dict(_flatten(study.settings or {}))
    for name in ("precision", "train_images", "test_images"):
        settings[name] = _text(getattr(study, name))
    for arm, entry in run.trained.items():
        if entry.processes:
            settings[f"processes.{arm}"] = _text(list(entry.processes))
    if study.settings is None:
        # An older version wrote names only; lengths tell at least some recipes apart.
        settings |= {f"epochs.{arm}": _text(e.epochs) for arm, e in run.trained.items() if arm in ("large", "finetune")}
    return settings


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{printable(name)}.")
        else:
            yield f"{prefix}{printable(name)}", _text(value)


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


def _target(target: Mapping[str, Any]) -> str:
    return ", ".join(f"{printable(name)} {_text(value)}" for name, value in target.items())


def _check_by(by: Sequence[str], settings: Iterable[Mapping[str, str]]) -> None:
    known = {name for each in settings for name in each}
    unknown = [name for name in by if name not in known]
    if unknown:
        raise UserError(f"--by {unknown[0]}: no run has this setting; there are {', '.join(sorted(known))}")


def _differing(runs: Sequence[tuple[Run, Mapping[str, str]]]) -> dict[str, str]:
    """Return the settings that differ, each with its values and runs in words; an unrecorded one agrees with any."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, settings in runs:
        for name, value in settings.items():
            found[name][value].append(run.name)
    return {
        name: f"{name} ({', '.join(f'{_shown(value)} in {_named(names)}' for value, names in values.items())})"
        for name, values in found.items()
        if len(values) > 1
    }


def _refusal(differing: Mapping[str, str]) -> str:
    rows = " ".join(f"--by {name}" for name in differing)
    return (
        f"these runs do not belong in one row: they differ in {'; '.join(differing.values())}. Name only those that "
        f"belong together, make rows of their own with {rows}, or mix them with --mix"
    )


def _shown(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:20]}..."


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return " and ".join([", ".join(names[:_NAMED]), *([f"{more} more"] if more > 0 else [])])


def _merged(runs: Sequence[tuple[Run, Mapping[str, str]]], *, mix: bool) -> tuple[list[Run], list[str]]:
    """Return one run for each seed (and for the settings that differ, where they are mixed), and notes."""
    notes = []
    differing = _differing(runs)
    if differing and not mix:
        raise UserError(_refusal(differing))
    if differing:
        notes.append(f"mixes runs that differ in {'; '.join(differing.values())}")
    same: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run, settings in runs:
        same[run.study.seed, *(settings.get(name, "") for name in differing)].append(run)
    merged = []
    for (seed, *_), found in sorted(same.items()):
        run = found[0]
        for other in found[1:]:
            run = _merge(run, other)
        merged.append(run)
        if len(found) > 1:
            names = _named([each.name for each in found])
            notes.append(f"seed {seed}: {names} hold the same run; it is counted once")
    return merged, [*notes, *_circumstances([run for run, _ in runs])]


def _merge(first: Run, second: Run) -> Run:
    """Return one run of two with the same seed and settings: the same stages, or arms that were added later."""
    entries: dict[str, Trained] = dict(first.trained)
    for name, entry in second.trained.items():
        other = entries.get(name)
        if other is None or not other.finished:
            entries[name] = entry
        elif entry.finished and not _same(other, entry):
            raise UserError(
                f"seed {first.study.seed} has two results: {name} is {_result(other)} in {first.name} and "
                f"{_result(entry)} in {second.name}; name only one of these runs"
            )
    study = first.study.model_copy(update={"arms": tuple(dict.fromkeys((*first.study.arms, *second.study.arms)))})
    return first.model_copy(
        update={
            "study": study,
            "large": entries.pop("large", None),
            "sparse": entries.pop("sparse", None),
            "pruned": _fuller(first, second),
            "arms": entries,
        }
    )


def _same(first: Trained, second: Trained) -> bool:
    other_stage = None not in (first.stage, second.stage) and first.stage != second.stage
    return not other_stage and (first.top1, first.epochs) == (second.top1, second.epochs)


def _result(entry: Trained) -> str:
    return f"{entry.top1:.2f} after {entry.epochs} epochs" + (f" ({entry.stage})" if entry.stage else "")


def _fuller(first: Run, second: Run) -> Pruned | None:
    if first.pruned is None or (first.pruned.top1 is None and second.pruned is not None):
        return second.pruned
    return first.pruned


def _circumstances(runs: Sequence[Run]) -> list[str]:
    """Return notes on where the runs of a group were made, if that differs."""
    notes = []
    for name in _CIRCUMSTANCES:
        values = {run.study.device if name == "device" else run.study.versions.get(name, "") for run in runs}
        if len(values - {""}) > 1:
            notes.append(f"runs were made with different {name}: {', '.join(sorted(values - {''}))}")
    unrecorded = sum(run.study.settings is None for run in runs)
    if unrecorded:
        notes.append(
            f"{unrecorded} runs are of an older version that recorded the names of recipe and budget, not their "
            "settings: that these are equal could not be checked"
        )
    return notes


def _natural(key: Sequence[Any]) -> tuple[Any, ...]:
    """Return a sort key in which numbers in targets count as numbers."""
    words = [word for part in key[:6] for word in str(part).split()]
    return tuple((0, float(w), "") if w.replace(".", "", 1).isdecimal() else (1, 0.0, w) for w in words)
