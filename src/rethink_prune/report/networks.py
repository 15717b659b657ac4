"""The networks of a study as a report shows them: what each is called, how it is drawn, and in which order."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rethink_prune.study.arms import ARMS, Arm, Style, known_arm

# The first columns of a table; the other arms come after those of the paper.
PAPER_ARMS = ("large", "finetune", "scratch_e", "scratch_b")
# The first columns of a detection table: the networks that detectors start from, by the paper's names.
PAPER_DETECTORS = ("unpruned", "prune_c", "prune_d", "scratch_e", "scratch_b")
# Begins the names of what trains detectors, where arms have names too.
DETECT = "detect_"
PRUNED = "pruned"
RECALIBRATED = "pruned_recalibrated"


@dataclass(frozen=True)
class NetworkLabel:
    """What a network that is no arm is called in a table (`title`) and in a sentence (`name`), and its `style`."""

    title: str
    name: str
    style: Style


_UNKNOWN_STYLE = Style("#CC79A7", (0, (6, 2)), "X")
# Only networks that are no arms: an arm brings its title, name and style in `ARMS`.
_NOT_ARMS = {
    "large": NetworkLabel("unpruned", "the unpruned network", Style("#000000", (0, (1, 1)), "s")),
    "sparse": NetworkLabel(
        "trained by the pruner", "the network the pruner trained", Style("#009E73", (0, (3, 1, 1, 1)), "P")
    ),
    PRUNED: NetworkLabel("pruned, not retrained", "pruned, not retrained", _UNKNOWN_STYLE),
    RECALIBRATED: NetworkLabel(
        "pruned, statistics re-estimated", "pruned, statistics re-estimated", Style("#999999", (0, (1, 3)), "d")
    ),
}
# What detectors start from, where that is no arm, or one that has another name there.
_DETECTORS = {
    "unpruned": _NOT_ARMS["large"],
    "prune_c": NetworkLabel("Prune-C", "Prune-C", ARMS["finetune"].style),
    "prune_d": NetworkLabel("Prune-D", "Prune-D", Style("#661100", (0, (9, 2, 1, 2)), "x")),
}
# Names without a length behind them that mean one.
_OLD_NAMES = {
    **{"scratch_e": "scratch@e", "scratch_b": "scratch@b", "lottery": "lottery@e", "lottery_b": "lottery@b"},
    **{name: f"{name}@e" for name in ("weight_rewind", "reshuffle")},
}


def split_name(network: str) -> tuple[str, str]:
    """Return the family of an arm and its length as it was typed; no length where the name has none.

    Examples
    --------
    >>> split_name("retrain@0.5x"), split_name("scratch_e"), split_name("finetune")
    (('retrain', '0.5x'), ('scratch', 'e'), ('finetune', ''))
    """
    family, _, length = _OLD_NAMES.get(network, network).partition("@")
    return family, length


def is_ticket(network: str) -> bool:
    """Tell whether an arm is a ticket, random or not, or rewinds weights or the learning rate.

    Examples
    --------
    >>> [is_ticket(arm) for arm in ("finetune", "lottery@12", "reshuffle", "lr_rewind", "an_arm_of_a_later_version")]
    [False, True, True, True, False]
    """
    arm = known_arm(network)
    return arm is not None and (arm.weights in ("initial", "early") or arm.length == "rewind")


def has_own_name(network: str) -> bool:
    """Tell whether an arm is compared with fine-tuning, though its length may be one of several.

    Those are the arms of the paper, and the one that gets fine-tuning's computation.

    Examples
    --------
    >>> [has_own_name(arm) for arm in ("scratch_e", "scratch@total:finetune", "scratch@12")]
    [True, True, False]
    """
    return "@" not in network or split_name(network)[1] == "total:finetune"


def network_label(network: str) -> Arm | NetworkLabel:
    """Return the title, name and style of an arm or another network; an unknown one is called what it is.

    Examples
    --------
    >>> network_label("finetune").title, network_label("finetune").name
    ('fine-tuned', 'fine-tuning')
    >>> network_label("large").name, network_label("an_arm_of_a_later_version").name
    ('the unpruned network', 'an_arm_of_a_later_version')
    """
    known = known_arm(network) or ARMS.get(network) or _NOT_ARMS.get(network) or _DETECTORS.get(network)
    return known or NetworkLabel(network, network, _UNKNOWN_STYLE)


def trains_pruned(network: str) -> bool:
    """Tell whether an arm trains the pruned network; an unknown arm is taken for one that does.

    Examples
    --------
    >>> [trains_pruned(network) for network in ("large", "finetune", "large_longer")]
    [False, True, False]
    """
    arm = known_arm(network)
    return arm.network == "pruned" if arm else network not in _NOT_ARMS


def has_pruned_positions(network: str) -> bool:
    """Tell whether an arm keeps those weights that pruning left, not as many at random.

    Examples
    --------
    >>> [has_pruned_positions(arm) for arm in ("scratch_e", "reshuffle", "large_longer", "an_arm_of_a_later_version")]
    [True, False, False, False]
    """
    arm = known_arm(network)
    return arm is not None and arm.network == "pruned" and not arm.shuffled


def in_column_order(networks: Iterable[str]) -> list[str]:
    """Return networks in the order of a table's columns; unknown ones come after the arms of the paper.

    Examples
    --------
    >>> in_column_order({"pruned", "large_longer", "scratch_b", "unknown", "finetune", "large"})
    ['large', 'finetune', 'scratch_b', 'unknown', 'large_longer', 'pruned']
    >>> in_column_order({"retrain@16", "retrain@2", "scratch@2", "retrain@0.5x"})
    ['retrain@0.5x', 'retrain@2', 'retrain@16', 'scratch@2']
    """
    order = [*PAPER_ARMS, *(arm for arm in ARMS if arm not in PAPER_ARMS), "sparse", PRUNED, RECALIBRATED]
    after_paper = len(PAPER_ARMS) - 0.5

    def place(name: str) -> tuple[float, list[str | float]]:
        base = name if name in order else name.partition("@")[0]
        # Numbers count as numbers: they are every second part.
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        numbers = [float(part) if index % 2 else part for index, part in enumerate(parts)]
        return (order.index(base) if base in order else after_paper), numbers

    return sorted(networks, key=place)


def in_detector_order(entries: Iterable[str]) -> list[str]:
    """Return what detectors start from in the order of a table's columns: the paper's first.

    Examples
    --------
    >>> in_detector_order({"lottery", "scratch_e", "prune_d", "unpruned"})
    ['unpruned', 'prune_d', 'scratch_e', 'lottery']
    """
    names = in_column_order(entries)
    return [name for name in PAPER_DETECTORS if name in names] + [name for name in names if name not in PAPER_DETECTORS]
