"""One training may have several names, as ``scratch_e`` and ``scratch@12``: it counts once, under the first of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

from rethink_prune.report.networks import in_column_order
from rethink_prune.report.records import RunRecord


def other_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the arms that are another name of a training, each with the name under which it counts.

    Two names are one training where some runs have them as one stage, and no run as two.
    """
    same: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for run in runs:
        stages = {name: run.arms[name].stage for name in in_column_order(run.arms) if run.arms[name].stage}
        for first, second in combinations(stages, 2):
            same[first, second].add(stages[first] == stages[second])
    names: dict[str, str] = {}
    # In the order of columns, so the first name of a training is no other's.
    for first, second in same:
        if same[first, second] == {True}:
            names.setdefault(second, first)
    return names


def under_one_name(runs: Sequence[RunRecord], names: Mapping[str, str]) -> list[RunRecord]:
    """Return the runs with each training under one name, what was asked for and what is unfinished too."""

    def renamed(run: RunRecord) -> RunRecord:
        # What stands under the name that counts comes last: it has the last word.
        parts = {
            part: {names.get(name, name): entries[name] for name in sorted(entries, key=lambda name: name not in names)}
            for part, entries in (("arms", run.arms), ("unfinished", run.unfinished))
        }
        arms = tuple(dict.fromkeys(names.get(name, name) for name in run.study.arms))
        return run.model_copy(update={**parts, "study": run.study.model_copy(update={"arms": arms})})

    return [renamed(run) for run in runs] if names else list(runs)
