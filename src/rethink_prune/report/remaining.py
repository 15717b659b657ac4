"""Accuracy over what remains: the sizes of a sweep over how much goes, and the rounds of studies that prune in several.

Rows that differ in nothing but how much goes are one sweep. It has two curves for each arm: networks pruned in one cut,
and networks pruned in rounds.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from rethink_prune.config import TARGET_OPTIONS
from rethink_prune.report.groups import TRANSFER, recorded_settings
from rethink_prune.report.networks import in_column_order, is_ticket, trains_pruned
from rethink_prune.report.records import RoundRecord, RunRecord, value_text
from rethink_prune.report.statistics import SeedStatistics, describe_seeds
from rethink_prune.study.arms import BETWEEN_ROUNDS

_SHARE = "share_per_round"
_HOW_MUCH = {*TARGET_OPTIONS, "rounds"}
# A target, and in how many rounds it is reached, where that matters.
_Schedule = tuple[str, int | None]


@dataclass(frozen=True)
class RoundOverSeeds:
    """One round of a row.

    Attributes
    ----------
    params, channels, macs, epochs
        Means over seeds; `channels` is None where single weights go, `epochs` after the last round.
    params_kept
        Percent of the unpruned network's.
    top1_before, top1, top1_recalibrated, top1_trained
        Percent: before this round's pruning, after it, with re-estimated statistics, and after the training that
        follows.
    """

    round: int
    params: float | None
    params_kept: SeedStatistics | None
    channels: float | None
    macs: float | None
    top1_before: SeedStatistics | None
    top1: SeedStatistics | None
    top1_recalibrated: SeedStatistics | None
    top1_trained: SeedStatistics | None
    epochs: float | None


@dataclass(frozen=True)
class Size:
    """How much remains in one row, or after one round of it, and the accuracies there.

    Attributes
    ----------
    params_kept, macs_kept
        Percent of the unpruned network's; one of them is known.
    top1
        By arm.
    """

    network: str
    pruned_by: str
    in_rounds: bool
    params_kept: SeedStatistics | None
    macs_kept: SeedStatistics | None
    top1: Mapping[str, SeedStatistics]


@dataclass(frozen=True)
class SizeSweep:
    """The sizes of one network and pruner; those that were cut at once come first, and larger ones before smaller ones.

    Attributes
    ----------
    sweep
        As in the rows that it is made of.
    title
        With the settings that other sizes of the sweep do not share.
    unpruned
        Accuracy of the unpruned network, over all seeds of the sweep.
    """

    sweep: str
    title: str
    unpruned: SeedStatistics | None
    sizes: tuple[Size, ...]

    @property
    def arms(self) -> list[str]:
        """Every arm that has a size."""
        return in_column_order({arm for size in self.sizes for arm in size.top1})


@dataclass(frozen=True)
class SizedRow:
    """What a row of a table brings to a sweep; `left_out` are arms that are compared over lengths."""

    sweep: str
    pruned_by: str
    runs: Sequence[RunRecord]
    left_out: Sequence[str] = ()

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """What its runs have in common, without what says how much goes."""
        return _settings_beside_size(self)


def rounds_over_seeds(runs: Sequence[RunRecord]) -> Iterator[RoundOverSeeds]:
    """Yield the rounds of a row's runs in their order; none where it prunes in one cut."""
    for number in sorted({each.round for run in runs for each in run.rounds}):
        found = [(run, each) for run in runs for each in run.rounds if each.round == number]
        rounds = [each for _, each in found]

        def seeds(top1: list[float | None]) -> SeedStatistics | None:
            return describe_seeds([value for value in top1 if value is not None])

        yield RoundOverSeeds(
            round=number,
            params=mean_if_known([each.params for each in rounds]),
            params_kept=kept_shares([(each.params, run.params_unpruned) for run, each in found]),
            channels=mean_if_known([each.channels for each in rounds]),
            macs=mean_if_known([each.macs for each in rounds]),
            top1_before=seeds([each.top1_before for each in rounds]),
            top1=seeds([each.top1 for each in rounds]),
            top1_recalibrated=seeds([each.top1_recalibrated for each in rounds]),
            top1_trained=seeds([each.top1_trained for each in rounds]),
            epochs=mean_if_known([each.epochs for each in rounds if each.top1_trained is not None]),
        )


def size_sweeps(rows: Sequence[SizedRow]) -> Iterator[SizeSweep]:
    """Yield the sweeps that have a ticket, a rewound network or rounds, and two sizes or more."""
    sweeps: dict[str, list[SizedRow]] = defaultdict(list)
    for row in rows:
        sweeps[row.sweep].append(row)
    for sweep, members in sweeps.items():
        arms = {arm for row in members for run in row.runs for arm in run.arms}
        if any(map(is_ticket, arms)) or any(run.rounds for row in members for run in row.runs):
            for title, alike in _equal_but_for_size(sweep, members):
                found = _size_sweep(sweep, title, alike)
                if len({(size.params_kept, size.macs_kept) for size in found.sizes}) > 1:
                    yield found


def _equal_but_for_size(sweep: str, rows: Sequence[SizedRow]) -> Iterator[tuple[str, list[SizedRow]]]:
    """Yield the rows that differ in how much goes alone, each time with what sets them apart from the others."""
    for apart, numbers in alike([row.settings for row in rows]):
        yield ", ".join([sweep, *apart]), [rows[number] for number in numbers]


def alike(settings: Sequence[Mapping[str, str]]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the numbers of entries that agree in all settings, with the settings that set them apart from the others.

    A setting that one of two entries lacks agrees with any value.

    Examples
    --------
    >>> list(alike([{"lr": "0.1"}, {"lr": "0.2"}, {"lr": "0.1", "seed": "0"}]))
    [(['lr 0.1'], [0, 2]), (['lr 0.2'], [1])]
    """
    families: list[list[int]] = []
    for number, its in enumerate(settings):
        fitting = (family for family in families if not any(_differing(its, settings[other]) for other in family))
        family = next(fitting, None)
        if family is None:
            families.append(family := [])
        family.append(number)
    # Between families alone: entries of one family have nothing to tell apart.
    pairs = product(settings, repeat=2) if len(families) > 1 else ()
    apart = sorted({name for one, other in pairs for name in _differing(one, other)})
    for family in families:
        values = {name: settings[number][name] for number in family for name in apart if name in settings[number]}
        yield [f"{name} {value}" for name, value in values.items()], family


def _settings_beside_size(row: SizedRow) -> dict[str, str]:
    """Return what a row's runs have in common, without what says how much goes."""
    study = row.runs[0].study
    how_much = {*_HOW_MUCH, *study.target}
    if not study.rounds:
        # One cut has nothing between rounds.
        how_much.add("between_rounds")
    elif _SHARE not in study.target:
        # Two numbers of rounds reach a target on ways of their own, of which each has a curve.
        how_much.discard("rounds")
    found: dict[str, set[str]] = defaultdict(set)
    for run in row.runs:
        for name, value in recorded_settings(run).items():
            found[name].add(value)
    return {
        name: values.pop()
        for name, values in found.items()
        # Numbers of processes change results within float tolerance; mixed rows have several values.
        if len(values) == 1 and not name.startswith(("processes.", "epochs.", TRANSFER))
        if not (name.startswith("pruner.") and how_much & {*name.split(".")})
    }


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """Return the settings that both have, with other values; what is not recorded agrees with any value."""
    return {name for name in one.keys() & other.keys() if one[name] != other[name]}


def _size_sweep(sweep: str, title: str, rows: Sequence[SizedRow]) -> SizeSweep:
    large = {
        entry.stage or f"seed {run.study.seed}": entry.top1
        for row in rows
        for run in row.runs
        if (entry := run.large) is not None and entry.finished and entry.top1 is not None
    }
    sizes = [size for size in [*map(_size_of_row, rows), *_sizes_between_rounds(rows)] if size.top1]
    sizes = [size for size in sizes if size.params_kept or size.macs_kept]

    def place(size: Size) -> tuple[bool, float]:
        kept = size.params_kept or size.macs_kept
        return size.in_rounds, -kept.mean if kept else 0.0

    return SizeSweep(sweep, title, describe_seeds(list(large.values())), tuple(sorted(sizes, key=place)))


def _size_of_row(row: SizedRow) -> Size:
    top1 = {
        arm: describe_seeds([entry.top1 for entry in finished if entry.top1 is not None])
        for arm in in_column_order({arm for run in row.runs for arm in run.arms})
        if trains_pruned(arm) and arm not in row.left_out
        if (finished := [run.arms[arm] for run in row.runs if arm in run.arms and run.arms[arm].finished])
    }
    params = [(run.pruned.params, run.params_unpruned) for run in row.runs if run.pruned]
    macs = [(run.pruned.macs, run.study.ledger.macs_reference) for run in row.runs if run.pruned]
    known = {arm: found for arm, found in top1.items() if found is not None}
    study = row.runs[0].study
    return Size(study.model, row.pruned_by, bool(study.rounds), kept_shares(params), kept_shares(macs), known)


def _sizes_between_rounds(rows: Sequence[SizedRow]) -> Iterator[Size]:
    """Yield the networks that were trained between rounds: what a study with fewer rounds would have for an arm.

    Where a study of the same share with so many rounds has that arm, it is there already. A training that several
    studies share counts once.
    """
    rows_of_rounds: dict[tuple[_Schedule, int | None], list[SizedRow]] = defaultdict(list)
    found: dict[tuple[_Schedule, str, int], dict[str, tuple[str, RunRecord, RoundRecord]]] = defaultdict(dict)
    for row in rows:
        study = row.runs[0].study
        # With a share of what remains, each number of rounds goes the same way; a target is reached on ways of its own.
        schedule = (value_text(study.target), None if _SHARE in study.target else study.rounds)
        rows_of_rounds[schedule, study.rounds].append(row)
        arm = BETWEEN_ROUNDS.get(study.between_rounds)
        for run in row.runs:
            for each in run.rounds:
                if arm is not None and each.top1_trained is not None and _as_long_as(run, arm, each):
                    training = each.trained_stage or f"seed {run.study.seed}"
                    found[schedule, arm, each.round].setdefault(training, (row.pruned_by, run, each))
    # On its own way, a round toward a target is no size that another target has.
    ways = {schedule for schedule, _ in rows_of_rounds if schedule[1] is not None}
    for (schedule, arm, number), trainings in found.items():
        if schedule in ways and len(ways) > 1:
            continue
        there = rows_of_rounds[schedule, number]
        if any(arm in run.arms and run.arms[arm].finished for row in there for run in row.runs):
            continue
        pruned_by = next(iter(trainings.values()))[0]
        done = [(run, each) for _, run, each in trainings.values()]
        top1 = describe_seeds([each.top1_trained for _, each in done if each.top1_trained is not None])
        params = kept_shares([(each.params, run.params_unpruned) for run, each in done])
        macs = kept_shares([(each.macs, run.study.ledger.macs_reference) for run, each in done])
        if top1 is not None:
            yield Size(done[0][0].study.model, f"{pruned_by}, after round {number}", True, params, macs, {arm: top1})


def _as_long_as(run: RunRecord, arm: str, each: RoundRecord) -> bool:
    """Tell whether a training between rounds took as long as the arm that it stands for, as far as that is known."""
    entry = run.arms.get(arm)
    return entry is None or None in (entry.epochs, each.epochs) or entry.epochs == each.epochs


def kept_shares(parts: Sequence[tuple[float | None, float | None]]) -> SeedStatistics | None:
    """Return the share in percent of each part in its whole, over the seeds where both are known.

    Examples
    --------
    >>> kept_shares([(50, 200), (60, 200), (None, 200)]).mean
    27.5
    """
    return describe_seeds([100 * part / whole for part, whole in parts if part is not None and whole])


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if any value is not known.

    Examples
    --------
    >>> mean_if_known([1.0, 2.0]), mean_if_known([1.0, None]), mean_if_known([])
    (1.5, None, None)
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
