"""Curves of many runs for TensorBoard: grouped, labelled, and averaged over seeds, finished or not."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rethink_prune.report.aliases import other_names, under_one_name
from rethink_prune.report.detection import transfer_name
from rethink_prune.report.groups import TRANSFER, TRANSFER_PROCESSES, natural_order, recorded_settings
from rethink_prune.report.networks import DETECT, PAPER_ARMS, PAPER_DETECTORS, in_column_order, in_detector_order
from rethink_prune.report.records import RunRecord, StudyRecord, TrainingRecord, value_text
from rethink_prune.report.seed_curve import curve_over_seeds
from rethink_prune.tracking.board import MEAN, BoardCurve, BoardGroup

# Named in a label wherever two groups differ in them.
_CONDITIONS = ("dataset", "recipe", "budget", "precision")
_LONGEST_WORD = 40


@dataclass
class _Group:
    study: StudyRecord
    settings: dict[str, str]
    # What detectors are tested on; None for a group of arms.
    pictures: str | None
    runs: list[RunRecord] = field(default_factory=list)
    arms: dict[str, dict[int, TrainingRecord]] = field(default_factory=lambda: defaultdict(dict))


def board_groups(runs: Iterable[RunRecord]) -> list[BoardGroup]:
    """Put runs that differ in the seed alone into groups, in the order of their labels, with every arm's curves.

    Runs that differ in anything else are in different groups, and the label says in what. Where one seed was trained
    twice, the longer curve counts, and of equal ones the one that comes last. Detectors have groups of their own, after
    the others: what they start from does not depend on the settings of the transfer.
    """
    runs = list(runs)
    groups, detecting = _groups(runs), _groups([run for run in runs if run.study.transfer], detection=True)
    # Those of the paper keep their places, and so their colours, where some are missing.
    arms = in_column_order({*PAPER_ARMS, *(arm for group in groups for arm in group.arms)})
    if detecting:
        started = {name.removeprefix(DETECT) for group in detecting for name in group.arms}
        arms += [f"{DETECT}{name}" for name in in_detector_order({*PAPER_DETECTORS, *started})]
    return [
        _board_group(label, group, arms)
        for its in (groups, detecting)
        for label, group in sorted(zip(_labels(its), its, strict=True), key=lambda item: natural_order([item[0]]))
    ]


def _groups(runs: Iterable[RunRecord], *, detection: bool = False) -> list[_Group]:
    """Return the groups that have a curve, of arms or of detectors."""
    found: dict[str, _Group] = {}
    for run in runs:
        settings = _what_decides(run, detection=detection)
        target = json.dumps(run.study.target, sort_keys=True)
        names = json.dumps([run.study.model, run.study.pruner, target, settings], sort_keys=True)
        pictures = transfer_name(run) if detection else None
        found.setdefault(names, _Group(run.study, settings, pictures)).runs.append(run)
    for group in found.values():
        _collect_curves(group)
    return [group for group in found.values() if any(group.arms.values())]


def _collect_curves(group: _Group) -> None:
    """Find the entry that counts of each arm, or detector, and seed; a training with several names counts once."""
    for run in under_one_name(group.runs, other_names(group.runs)):
        trainings = {**run.unfinished, **run.trained, **{f"{DETECT}{name}": d for name, d in run.transfer.items()}}
        for name, entry in trainings.items():
            if name.startswith(DETECT) != (group.pictures is not None):
                continue
            known = group.arms[name].get(run.study.seed)
            if entry.curve and (known is None or len(entry.curve) >= len(known.curve or ())):
                group.arms[name][run.study.seed] = entry


def _board_group(label: str, group: _Group, arms: Iterable[str]) -> BoardGroup:
    curves: dict[str, dict[str, BoardCurve]] = {}
    for arm in arms:
        seeds = group.arms[arm]
        if not seeds:
            curves[arm] = {}
            continue
        # A seed that is still trained would cut the mean of the others short.
        finished = [entry for entry in seeds.values() if entry.finished] or list(seeds.values())
        single = {f"seed {seed}": _board_curve([seeds[seed]]) for seed in sorted(seeds)}
        curves[arm] = {MEAN: _board_curve(finished), **single}
    measure = "top1" if group.pictures is None else "map"
    return BoardGroup(label, len({seed for seeds in group.arms.values() for seed in seeds}), measure, curves)


def _board_curve(entries: Sequence[TrainingRecord]) -> BoardCurve:
    """Return the curve over seeds; of unfinished ones, over the epochs that all have reached."""
    if not all(entry.finished for entry in entries):
        epochs = min(len(entry.curve or ()) for entry in entries)
        entries = [_beginning(entry, epochs) for entry in entries]
    curve = curve_over_seeds(entries)
    assert curve is not None, "only entries with a curve are kept"
    return BoardCurve(curve.epoch, curve.flops, curve.mean, curve.low, curve.high)


def _beginning(entry: TrainingRecord, epochs: int) -> TrainingRecord:
    """Return an entry as if its training had ended after so many epochs."""
    update: dict[str, object] = {"curve": (entry.curve or ())[:epochs]}
    if entry.train_flops is not None and entry.flops_before is not None and entry.epochs:
        own = entry.train_flops * epochs / entry.epochs
        update |= {"train_flops": own, "train_flops_total": entry.flops_before + own}
    return entry.model_copy(update=update)


def _what_decides(run: RunRecord, *, detection: bool) -> dict[str, str]:
    """Return what tells groups apart, those first that a label names first."""
    study = run.study
    named = {name: str(getattr(study, name)) for name in _CONDITIONS}
    # These depend on how far a run is; and no arm depends on a transfer.
    later = ("processes.", "epochs.", TRANSFER_PROCESSES if detection else TRANSFER)
    return named | {name: value for name, value in recorded_settings(run).items() if not name.startswith(later)}


def _labels(groups: Sequence[_Group]) -> list[str]:
    """Return a name for each group: its network, pruner and target, and what else sets it apart."""
    words = []
    kinds = {name for group in groups for name in group.study.target}
    for group in groups:
        target = group.study.target
        values = {name: _word(value_text(value)) for name, value in target.items()}
        shown = [value if len(kinds) == 1 else f"{name} {value}" for name, value in values.items()]
        on = [f"on {_word(group.pictures)}"] if group.pictures is not None else []
        words.append([_word(group.study.model), _word(group.study.pruner), *shown, *on])
    for name in _CONDITIONS:
        if len({group.settings[name] for group in groups}) > 1:
            for label, group in zip(words, groups, strict=True):
                # A recipe is often named after its data set.
                label += [word for word in (_word(group.settings[name]),) if word and word not in label]
    for name in dict.fromkeys(name for group in groups for name in group.settings if name not in _CONDITIONS):
        for members in _equal(words).values():
            theirs = [groups[number].settings.get(name, "not recorded") for number in members]
            if len(set(theirs)) > 1:
                for number, value in zip(members, theirs, strict=True):
                    words[number].append(f"{name} {_word(value)}")
    for members in _equal(words).values():
        # They differ only in what was left out.
        for copy, number in enumerate(members[1:], 2):
            words[number].append(f"no. {copy}")
    return [" ".join(label) for label in words]


def _equal(words: Sequence[Sequence[str]]) -> Mapping[str, list[int]]:
    """Return the numbers of the labels that are the same by now."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, label in enumerate(words):
        found[" ".join(label)].append(number)
    return found


def _word(text: str) -> str:
    """Return a part of a label: short, and without what means something in a tag's name."""
    # A slash would end the group's name; TensorBoard reads a run's name from between brackets.
    text = re.sub(r"[/()]", "_", text)
    return text if len(text) <= _LONGEST_WORD else f"{text[: _LONGEST_WORD - 3]}..."
