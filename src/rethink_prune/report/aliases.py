"""One training may have several names, as ``scratch_e`` and ``scratch@12``: it counts once, under the first of them."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from rethink_prune.report.networks import has_own_name
from rethink_prune.report.records import RunRecord


def other_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the arms that are another name of a training, each with the name under which it counts.

    Two names are one training where some runs have them as one stage, and no run as two.
    """
    # Those first that are compared with fine-tuning, then as they were asked for.
    order = sorted(dict.fromkeys(name for run in runs for name in run.arms), key=lambda name: not has_own_name(name))
    names: dict[str, str] = {}
    for first, second in combinations(order, 2):
        both = [(run.arms[first].stage, run.arms[second].stage) for run in runs if {first, second} <= run.arms.keys()]
        same = {one == other for one, other in both if one and other}
        if same == {True}:
            # The first one may be another name itself.
            names.setdefault(second, names.get(first, first))
    return names


def under_one_name(runs: Sequence[RunRecord], names: Mapping[str, str]) -> list[RunRecord]:
    """Return the runs with each training under one name, what was asked for and what is unfinished too."""

    def renamed(run: RunRecord) -> RunRecord:
        # What stands under the name that counts comes last: it has the last word.
        parts = {
            part: {names.get(name, name): entries[name] for name in sorted(entries, key=lambda name: name not in names)}
            for part, entries in (("arms", run.arms), ("unfinished", run.unfinished), ("transfer", run.transfer))
        }
        arms = tuple(dict.fromkeys(names.get(name, name) for name in run.study.arms))
        return run.model_copy(update={**parts, "study": run.study.model_copy(update={"arms": arms})})

    return [renamed(run) for run in runs] if names else list(runs)
