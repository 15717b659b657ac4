"""Which runs belong together: one group is one row of a table, its runs differ in nothing but the seed."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from rethink_prune.errors import UserError, suggestion
from rethink_prune.report.records import RunRecord, StudyRecord, TrainingRecord, printable, value_text
from rethink_prune.text import dotted_items

# The settings of a transfer begin with it: what is transferred does not depend on them.
TRANSFER = "transfer."
TRANSFER_PROCESSES = "transfer.processes."
# Runs named in a message; more are counted.
_MOST_NAMED = 3
_Entry = TypeVar("_Entry", bound=TrainingRecord)


@dataclass(frozen=True)
class RunGroup:
    """Runs of one study, one for each seed.

    Attributes
    ----------
    by
        Settings that were asked to tell groups apart, each with its value in this group.
    notes
        What a reader of the row has to know.
    """

    runs: tuple[RunRecord, ...]
    by: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def study(self) -> StudyRecord:
        """What was asked for: in all runs the same but for the seed, and for settings that are mixed."""
        return self.runs[0].study

    @property
    def precision(self) -> str:
        """The precision of its runs; all of them where they are mixed, nothing where it was not recorded."""
        return " and ".join(sorted({run.study.precision for run in self.runs} - {""}))

    @property
    def settings(self) -> list[str]:
        """What was asked to tell it apart, in words."""
        # A value can be the hash of a file, too long for a table.
        return [f"{name} {value[:20]}" for name, value in self.by]

    @property
    def pruned_by(self) -> str:
        """The pruner with its target, and what sets this group apart beside it."""
        return ", ".join([f"{self.study.pruner} {self.study.target_text}", *self.settings])

    def slug(self, number: int) -> str:
        """Return its name in file names: the number keeps groups apart whose names differ in nothing else."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.study.model} {self.pruned_by}".lower()).strip("-")
        return f"{number:02d}-{words[:60]}"

    @property
    def experiment(self) -> str | None:
        """The experiment file the runs were made with, if it is one."""
        names = {run.study.experiment for run in self.runs if run.study.experiment}
        return names.pop() if len(names) == 1 else None


def group_runs(runs: Sequence[RunRecord], *, by: Sequence[str] = (), mix: bool = False) -> list[RunGroup]:
    """Put runs into groups by data set, network, pruner, target, recipe and budget, and merge what is one run.

    Parameters
    ----------
    by
        Further settings to keep apart, such as ``recipe.lr``: a group for each value.
    mix
        Put runs into one group though their settings differ under the same names.

    Raises
    ------
    UserError
        If settings differ within a group and `mix` is off, if one seed has two results, or if `by` names a setting
        that no run has. All such reasons in one message, a line each.
    """
    known = {name for run in runs for name in recorded_settings(run)} if by else set()
    unknown = [name for name in by if name not in known]
    if unknown:
        raise UserError(f"--by {unknown[0]}: no run has this setting; {suggestion(unknown[0], sorted(known))}")
    found: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run in runs:
        study, settings = run.study, recorded_settings(run) if by else {}
        values = tuple((name, settings.get(name, "not recorded")) for name in by)
        # The target in words: it may be a list, which cannot be part of a key.
        names = (study.dataset, study.model, study.pruner, study.target_text, study.recipe, study.budget)
        found[names, values].append(run)
    groups, refused = [], []
    for (_, values), members in sorted(found.items(), key=lambda item: natural_order(item[0][0])):
        try:
            merged, notes = _merge_seeds(members, mix=mix)
        except UserError as error:
            study = members[0].study
            conditions = f"({study.dataset}, {study.recipe} recipe, {study.budget} budget)"
            # All groups are looked at before any is refused, so that one message names all that is wrong.
            refused.append(f"{study.model}, {study.pruner} {study.target_text} {conditions}: {error}")
        else:
            groups.append(RunGroup(tuple(merged), values, tuple(notes)))
    if refused:
        raise UserError("\n".join(refused))
    return groups


def natural_order(names: Sequence[str]) -> tuple[tuple[int, float, str], ...]:
    """Return a sort key in which numbers in targets count as numbers."""
    words = [word for name in names for word in name.split()]
    # Numbers and words cannot be compared: the first entry puts numbers before words.
    return tuple((0, float(w), "") if w.replace(".", "", 1).isdecimal() else (1, 0.0, w) for w in words)


def _merge_seeds(runs: Sequence[RunRecord], *, mix: bool) -> tuple[list[RunRecord], list[str]]:
    """Return one run for each seed (and for the settings that differ, where they are mixed), and notes."""
    notes = []
    settings_of = [recorded_settings(run) for run in runs]
    if differing := differing_settings(runs, settings_of):
        settings = "; ".join(differing.values())
        if not mix:
            rows = " ".join(f"--by {name}" for name in differing)
            advice = f"Name only those that belong together, make rows of their own with {rows}, or mix them with --mix"
            raise UserError(f"these runs do not belong in one row: they differ in {settings}. {advice}")
        notes.append(f"mixes runs that differ in {settings}")
    same: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run, recorded in zip(runs, settings_of, strict=True):
        # Mixed runs of one seed with different settings stay apart, and make pairs of their own. A transfer does not
        # change what is transferred: its settings would count one classification twice.
        apart = (recorded.get(name, "") for name in differing if not name.startswith(TRANSFER))
        same[run.study.seed, *apart].append(run)
    merged = []
    for (seed, *_), found in sorted(same.items()):
        merged.append(reduce(_merge_two, found))
        if len(found) > 1:
            names = name_runs([each.name for each in found])
            notes.append(f"seed {seed}: {names} hold the same run; it is counted once")
    return merged, [*notes, *_circumstances(runs)]


def _merge_two(first: RunRecord, second: RunRecord) -> RunRecord:
    """Return one run of two with the same seed and settings: the same stages, or arms that were added later."""

    def merge(ours: Mapping[str, _Entry], theirs: Mapping[str, _Entry], what: str = "") -> dict[str, _Entry]:
        entries = dict(ours)
        for name, entry in theirs.items():
            other = entries.get(name)
            if other is None or not other.finished:
                entries[name] = entry
            elif entry.finished and not _same_training(other, entry):
                results = f"{_result_text(other)} in {first.name} and {_result_text(entry)} in {second.name}"
                raise UserError(
                    f"seed {first.study.seed} has two results: {what}{name} is {results}; name only one of these runs"
                )
        return entries

    entries = merge(first.trained, second.trained)
    arms = tuple(dict.fromkeys((*first.study.arms, *second.study.arms)))
    # One that was stopped before it pruned has no ledger.
    ledger = second.study.ledger if first.study.ledger.macs_reference is None else first.study.ledger
    study = first.study.model_copy(update={"arms": arms, "ledger": ledger})
    if not study.transfer and second.study.transfer:
        settings = {**(study.settings or {}), "transfer": second.study.transfer}
        study = study.model_copy(update={"settings": settings})
    bases = {name: entries.pop(name, None) for name in ("large", "sparse")}
    # One that has no accuracy yet is of an unfinished run.
    pruned = second.pruned if first.pruned is None or first.pruned.top1 is None else first.pruned
    # An unfinished run has fewer rounds, or the last one is not trained yet.
    rounds = max(first.rounds, second.rounds, key=lambda done: (len(done), [r.top1_trained is not None for r in done]))
    update = {
        **bases,
        "early": first.early or second.early,
        "study": study,
        "pruned": pruned or first.pruned,
        "arms": entries,
        "rounds": rounds,
        "transfer": merge(first.transfer, second.transfer, "the detector of "),
    }
    return first.model_copy(update=update)


def _same_training(first: TrainingRecord, second: TrainingRecord) -> bool:
    # A stage's name is a hash of what decides its result. Older summaries may not have it.
    other_stage = None not in (first.stage, second.stage) and first.stage != second.stage
    return not other_stage and (first.result, first.epochs) == (second.result, second.epochs)


def _result_text(entry: TrainingRecord) -> str:
    return f"{entry.result:.2f} after {entry.epochs} epochs" + (f" ({entry.stage})" if entry.stage else "")


def _circumstances(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield notes on where the runs of a group were made, if that differs."""
    # These may change results within float tolerance, so they are noted, not refused.
    for name in ("device", "torch", "rethink-prune"):
        values = {run.study.device if name == "device" else run.study.versions.get(name, "") for run in runs} - {""}
        if len(values) > 1:
            yield f"runs were made with different {name}: {', '.join(sorted(values))}"
    if unrecorded := sum(run.study.settings is None for run in runs):
        gap = "the names of recipe and budget, not their settings: that these are equal could not be checked"
        yield f"{unrecorded} runs are of an older version that recorded {gap}"


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
    for start, detector in run.transfer.items():
        if detector.finished and detector.processes:
            settings[f"{TRANSFER_PROCESSES}{start}"] = value_text(list(detector.processes))
    return settings


def differing_settings(runs: Sequence[RunRecord], settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the settings that differ, each with its values and runs in words; `settings` are those of each run.

    A setting that a run did not record agrees with any value.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, recorded in zip(runs, settings, strict=True):
        for name, value in recorded.items():
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
