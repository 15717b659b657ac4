"""The arms: ways to get a trained network to compare. Everything about one is its entry here; a new arm is one more."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Length = Literal["large", "finetune", "scratch_b"]

_DASH_DOTS = (0, (5, 1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Style:
    """How a network's curve is drawn: told apart with any colour vision, and in black and white.

    Attributes
    ----------
    color : str
        Of Okabe and Ito's palette, in hexadecimal.
    dashes : str or tuple
        A line style of matplotlib.
    marker : str
        A marker of matplotlib.
    """

    color: str
    dashes: str | tuple[int, tuple[int, ...]]
    marker: str


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes
    ----------
    network : {"pruned", "large"}
        Which architecture it trains.
    weights : {"inherited", "fresh"}
        What it starts from: the weights that pruning left, or newly drawn ones.
    length : {"large", "finetune", "scratch_b"}
        Which of the budget's lengths it trains for. ``finetune`` also means the learning rate and schedule of
        ``recipe.finetune``; the others train with the recipe's own.
    title : str
        What a table's column is called.
    name : str
        What it is called in a sentence.
    meaning : str
        What it is, for readers who do not know it.
    style : Style
        How its curve is drawn. No two may share a colour, dashes or a marker; those of the networks that are no arm
        are in ``report/networks.py``.
    """

    network: Literal["pruned", "large"]
    weights: Literal["inherited", "fresh"]
    length: Length
    title: str
    name: str
    meaning: str
    style: Style


ARMS: Mapping[str, Arm] = {
    "finetune": Arm(
        network="pruned",
        weights="inherited",
        length="finetune",
        title="fine-tuned",
        name="fine-tuning",
        meaning="the pruned network, trained further from the weights that pruning left",
        style=Style("#E69F00", "-", "o"),
    ),
    "scratch_e": Arm(
        network="pruned",
        weights="fresh",
        length="large",
        title="Scratch-E",
        name="Scratch-E",
        meaning="the pruned architecture with new random weights, for as many epochs as the unpruned network",
        style=Style("#56B4E9", "--", "^"),
    ),
    "scratch_b": Arm(
        network="pruned",
        weights="fresh",
        length="scratch_b",
        title="Scratch-B",
        name="Scratch-B",
        meaning="the same for as much computation as the unpruned network's training, so for more epochs",
        style=Style("#0072B2", "-.", "D"),
    ),
    # The control: does the unpruned network gain as much from Scratch-B's epochs?
    "large_longer": Arm(
        network="large",
        weights="fresh",
        length="scratch_b",
        title="unpruned, longer",
        name="unpruned, longer",
        meaning="the unpruned network for Scratch-B's epochs",
        style=Style("#999999", _DASH_DOTS, "v"),
    ),
}


def draws_anew(arms: Iterable[str]) -> bool:
    """Tell whether one of these arms draws the weights of a pruned network anew.

    Examples
    --------
    >>> draws_anew(["finetune"]), draws_anew(["finetune", "scratch_e"])
    (False, True)
    """
    return any(ARMS[name].weights == "fresh" for name in arms)
