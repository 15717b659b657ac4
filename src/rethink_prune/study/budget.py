"""How long each arm trains, and what that costs.

Scratch-E trains the pruned architecture for as many epochs as the large network, Scratch-B for as much computation:
``int(base_epochs * macs_large / macs_pruned)`` epochs, with the learning-rate milestones at the same fractions.
"""

from __future__ import annotations

from dataclasses import dataclass

from rethink_prune.config import BudgetConfig, Phase, RecipeConfig
from rethink_prune.study.arms import Length


@dataclass(frozen=True)
class Training:
    """The length of one training.

    Attributes
    ----------
    epochs : int
    milestones : tuple of int
        Epochs after which the learning rate changes.
    gammas : tuple of float
        What it is then multiplied by.
    """

    epochs: int
    milestones: tuple[int, ...]
    gammas: tuple[float, ...]


def training_for(phase: Phase, epochs: int, base_epochs: int) -> Training:
    """Return a training of `epochs` whose learning rate changes where that of a phase of `base_epochs` does.

    Milestones that are fractions are fractions of `epochs`; epochs are scaled by ``epochs / base_epochs``, and with
    ``schedule=step`` the distance of two drops is. Milestones before the end of the first epoch are left out: with
    one of 0, the training would never see its learning rate.

    Examples
    --------
    >>> training_for(Phase(epochs=160, lr=0.1, milestones=(0.5, 0.75)), 243, 160).milestones
    (121, 182)
    >>> training_for(Phase(epochs=90, lr=0.1, schedule="step", step=30), 106, 90).milestones
    (35, 70, 105)
    """
    if phase.step is not None:
        step = phase.step * epochs // base_epochs
        milestones = tuple(range(step, epochs, step)) if step else ()
    else:
        milestones = tuple(
            m * epochs // base_epochs if isinstance(m, int) else int(m * epochs) for m in phase.milestones
        )
    gammas = phase.gamma if isinstance(phase.gamma, tuple) else (phase.gamma,) * len(milestones)
    kept = [(m, gamma) for m, gamma in zip(milestones, gammas, strict=True) if m > 0]
    return Training(epochs, tuple(m for m, _ in kept), tuple(gamma for _, gamma in kept))


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
        return training_for(recipe, epochs, self.rule.base_epochs or recipe.epochs)

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
    return training_for(phase, phase.epochs, phase.epochs)
