"""The arms: ways to get a trained network to compare. A new one is one more entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Length = Literal["large", "finetune", "scratch_b"]


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
    """

    network: Literal["pruned", "large"]
    weights: Literal["inherited", "fresh"]
    length: Length


ARMS: Mapping[str, Arm] = {
    "finetune": Arm(network="pruned", weights="inherited", length="finetune"),
    "scratch_e": Arm(network="pruned", weights="fresh", length="large"),
    "scratch_b": Arm(network="pruned", weights="fresh", length="scratch_b"),
    "large_longer": Arm(network="large", weights="fresh", length="scratch_b"),
}
