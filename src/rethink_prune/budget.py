"""How long each arm trains, and what that costs.

Scratch-E trains the pruned architecture for as many epochs as the large network, Scratch-B for as much computation:
``int(base_epochs * macs_large / macs_pruned)`` epochs, with the learning-rate milestones at the same fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rethink_prune.arms import Length
from rethink_prune.config import BudgetConfig, Phase, RecipeConfig


@dataclass(frozen=True)
class Training:
    """The length of one training: `epochs`, and the `milestones` at which its learning rate drops."""

    epochs: int
    milestones: tuple[int, ...]


def milestones_for(milestones: Sequence[float | int], epochs: int, base_epochs: int) -> tuple[int, ...]:
    """Return milestones for a training of `epochs`.

    Parameters
    ----------
    milestones : sequence of float or int
        Fractions of the epochs, or epochs of a training of `base_epochs`. Those that come before the end of the first
        epoch are left out.

    Examples
    --------
    >>> milestones_for([0.5, 0.75], 243, 160), milestones_for([80, 120], 243, 160)
    ((121, 182), (121, 182))
    """
    scaled = (m * epochs // base_epochs if isinstance(m, int) else int(m * epochs) for m in milestones)
    # A milestone of 0 would mean that the training never sees its learning rate.
    return tuple(m for m in scaled if m > 0)


def scratch_b_epochs(
    base_epochs: int,
    macs_large: int,
    macs_pruned: int,
    *,
    cap: float | None = None,
    finetune_epochs: int = 0,
) -> int:
    """Return the epochs in which the pruned network uses the computation of `base_epochs` of the large one.

    Parameters
    ----------
    base_epochs : int
        Epochs of the large network.
    macs_large, macs_pruned : int
        MACs per image; for masked networks those of non-zero weights.
    cap : float, optional
        Longest length, as a multiple of `base_epochs`; the paper caps ImageNet at 2.
    finetune_epochs : int
        Added on top, uncapped: the stricter rule of Wang et al. 2023 (arXiv:2301.05219), which gives Scratch-B the
        computation of fine-tuning as well.

    Examples
    --------
    >>> scratch_b_epochs(160, 313463808, 206284800)
    243
    """
    # Whole numbers throughout: a ratio as a float can fall just short of the next epoch.
    epochs = base_epochs * macs_large // macs_pruned
    if cap is not None:
        epochs = min(epochs, int(base_epochs * cap))
    return epochs + finetune_epochs


@dataclass(frozen=True)
class Budget:
    """The lengths of a study's trainings.

    Attributes
    ----------
    recipe : RecipeConfig
    rule : BudgetConfig
    macs_reference : int
        MACs per image of the network that Scratch-B is measured against.
    macs_pruned : int
        MACs per image of the pruned network.
    """

    recipe: RecipeConfig
    rule: BudgetConfig
    macs_reference: int
    macs_pruned: int

    def training(self, length: Length) -> Training:
        """Return the epochs and milestones of an arm with this length."""
        recipe = self.recipe
        if length == "finetune":
            return phase_training(recipe.finetune)
        if length == "large":
            return phase_training(recipe)
        epochs = scratch_b_epochs(
            self.rule.base_epochs or recipe.epochs,
            self.macs_reference,
            self.macs_pruned,
            cap=self.rule.cap,
            finetune_epochs=recipe.finetune.epochs if self.rule.add_finetune_epochs else 0,
        )
        return Training(epochs, milestones_for(recipe.milestones, epochs, recipe.epochs))

    def summary(self) -> dict[str, object]:
        """Return the rule and the numbers it was applied to."""
        return {
            "rule": self.rule.name,
            "base_epochs": self.rule.base_epochs or self.recipe.epochs,
            "cap": self.rule.cap,
            "finetune_epochs_added": self.recipe.finetune.epochs if self.rule.add_finetune_epochs else 0,
            "macs_reference": self.macs_reference,
            "macs_pruned": self.macs_pruned,
            "macs_ratio": round(self.macs_reference / self.macs_pruned, 4),
        }


def phase_training(phase: Phase) -> Training:
    """Return the length of a phase as it is written in the recipe."""
    return Training(phase.epochs, milestones_for(phase.milestones, phase.epochs, phase.epochs))
