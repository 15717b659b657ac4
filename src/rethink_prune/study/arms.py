"""The arms: ways to get a trained network to compare. Everything about one is its entry here; a new arm is one more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Length = Literal["large", "finetune", "scratch_b"]


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
        Which of the budget's lengths it trains for; ``finetune`` also means the recipe's fine-tuning phase.
    title : str
        What a table's column is called.
    name : str
        What it is called in a sentence.
    style : Style
        How its curve is drawn.
    """

    network: Literal["pruned", "large"]
    weights: Literal["inherited", "fresh"]
    length: Length
    title: str
    name: str
    style: Style


ARMS: Mapping[str, Arm] = {
    "finetune": Arm(
        network="pruned",
        weights="inherited",
        length="finetune",
        title="fine-tuned",
        name="fine-tuning",
        style=Style("#E69F00", "-", "o"),
    ),
    "scratch_e": Arm(
        network="pruned",
        weights="fresh",
        length="large",
        title="Scratch-E",
        name="Scratch-E",
        style=Style("#56B4E9", "--", "^"),
    ),
    "scratch_b": Arm(
        network="pruned",
        weights="fresh",
        length="scratch_b",
        title="Scratch-B",
        name="Scratch-B",
        style=Style("#0072B2", "-.", "D"),
    ),
    "large_longer": Arm(
        network="large",
        weights="fresh",
        length="scratch_b",
        title="unpruned, longer",
        name="unpruned, longer",
        style=Style("#999999", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ),
}
