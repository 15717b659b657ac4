"""How long each arm trains, and what that costs.

Scratch-E trains the pruned architecture for as many epochs as the large network, Scratch-B for as much computation:
``int(base_epochs * macs_large / macs_pruned)`` epochs, with the learning-rate milestones at the same fractions. An arm
with a length of its own, such as ``retrain@12``, has the schedule of the large network's recipe, scaled to that length.
"""

from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from operator import mul

from rethink_prune.config import BudgetConfig, Phase, RecipeConfig, RewindConfig
from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.study.arms import Epochs, Length, Share, Total
from rethink_prune.training.adaptive_start import AdaptiveStart
from rethink_prune.training.schedule import OptimizerSpec


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
    base_epochs: int, macs_large: int, macs_pruned: int, *, cap: float | None = None, finetune_epochs: int = 0
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
    """Derives the lengths of a study's trainings, and keeps the ledger of what they cost.

    Attributes
    ----------
    recipe, rule
        How networks are trained, and how long Scratch-B may train.
    large : Cost
        Of the unpruned network.
    macs_reference : int
        MACs per image of the network that Scratch-B is measured against.
    train_images : int
        Images of an epoch.
    trains_sparse : bool
        Whether the pruner trains the unpruned network its own way, beside the plain training.
    rewind : RewindConfig
        How far tickets go back.
    """

    recipe: RecipeConfig
    rule: BudgetConfig
    large: Cost
    macs_reference: int
    train_images: int
    trains_sparse: bool = False
    rewind: RewindConfig = field(default_factory=RewindConfig)

    @property
    def early_epochs(self) -> int:
        """The epochs after which the unpruned network has the weights that are rewound to; 0 for the initial ones."""
        return self._rewound(self.rewind.epoch)

    @property
    def base_epochs(self) -> int:
        """The epochs that Scratch-B stretches."""
        return self.rule.base_epochs or self.recipe.epochs

    @property
    def finetune_epochs(self) -> int:
        """The epochs of fine-tuning that Scratch-B gets on top."""
        return self.recipe.finetune.epochs if self.rule.add_finetune_epochs else 0

    def optimizer(self, length: Length, pruned: Cost | None, *, taught: bool = False) -> OptimizerSpec | None:
        """Return how a network is trained for this length; None where that follows from a pruned network not known yet.

        Parameters
        ----------
        length : Length
        pruned : Cost, optional
            Of the pruned network.
        taught : bool
            Whether it has the unpruned network as its teacher.

        Raises
        ------
        UserError
            If the learning rate would fall before the warm-up is over, as the recipe has it; in a training of another
            length the warm-up is made shorter instead.
        ValueError
            As `epochs`.
        """
        if length == "rewind":
            whole, epochs = self.optimizer("large", pruned), self.epochs(length, pruned)
            assert whole is not None
            assert epochs is not None
            return replace(whole, epochs=epochs, passed=whole.epochs - epochs)
        phase: Phase = self.recipe.finetune if length == "finetune" else self.recipe
        epochs = self.epochs(length, pruned, taught=taught)
        if epochs is None:
            return None
        training = training_for(phase, epochs, self.base_epochs if length == "scratch_b" else phase.epochs)
        shared = {"optimizer", "momentum", "nesterov", "weight_decay", "decay_norms", "label_smoothing"}
        return OptimizerSpec(
            **self.recipe.model_dump(include=shared),
            **asdict(training),
            lr=self.peak_lr if phase.lr == "auto" else phase.lr,
            start=AdaptiveStart(min(1.0, epochs / self.recipe.epochs)) if phase.lr == "auto" else None,
            # Steps are written as milestones by now.
            schedule="multistep" if phase.schedule == "step" else phase.schedule,
            warmup=self._warmup(phase, training, length),
        )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the recipe, whose factors may raise it."""
        training = training_for(self.recipe, self.recipe.epochs, self.recipe.epochs)
        factors = accumulate(training.gammas, mul) if self.recipe.schedule == "multistep" else ()
        return float(self.recipe.lr) * max([1.0, *factors])

    def epochs(self, length: Length, pruned: Cost | None, *, taught: bool = False) -> int | None:
        """Return the epochs of a length; None where they follow from a pruned network that is not known yet.

        Raises
        ------
        ValueError
            If a share of the recipe's epochs is less than one.
        """
        match length:
            case "large":
                return self.recipe.epochs
            case "finetune":
                return self.recipe.finetune.epochs
            case "rewind":
                epochs = self._rewound(self.rewind.length)
                if epochs < 1:
                    raise ValueError(
                        f"rewind.length={self.rewind.length:g} is less than one of the {self.recipe.epochs} epochs of "
                        "recipe.epochs; take at least one epoch"
                    )
                return epochs
            case Epochs(count):
                return count
            case Share(factor):
                # A product such as 0.29 * 100 falls just short of the whole number that is meant.
                epochs = int(factor * self.recipe.epochs + 1e-9)
                if epochs < 1:
                    raise ValueError(
                        f"{factor:g}x is less than one of the {self.recipe.epochs} epochs of recipe.epochs; take at "
                        "least one epoch"
                    )
                return epochs
            case Total(retrained):
                retraining = self.epochs(retrained, pruned)
                if pruned is None or retraining is None:
                    return None
                # The unpruned network is trained for the recipe's epochs, by a pruner's own training as well. A teacher
                # has to be trained for either arm.
                saved = 0 if taught and not self.trains_sparse else self.large.train_flops(self.recipe.epochs)
                return retraining + saved // self.image_flops(pruned, taught=taught)
            case "scratch_b":
                if pruned is None:
                    return None
                return scratch_b_epochs(
                    self.base_epochs,
                    self.macs_reference,
                    pruned.macs,
                    cap=self.rule.cap,
                    finetune_epochs=self.finetune_epochs,
                )

    def _rewound(self, amount: float) -> int:
        """Return whole epochs: as they are, or a share of the recipe's."""
        return int(amount) if amount >= 1 else int(amount * self.recipe.epochs + 1e-9)

    def _warmup(self, phase: Phase, training: Training, length: Length) -> int:
        """Return the epochs of warm-up: the phase's own where its length is; scaled for a length that was typed."""
        first_drop = training.milestones[0] if training.milestones else training.epochs
        if length in ("large", "finetune"):
            if phase.warmup and training.milestones and first_drop <= phase.warmup:
                where = "recipe.finetune" if length == "finetune" else "recipe"
                raise UserError(
                    f"{where}.warmup={phase.warmup}: the learning rate would fall after epoch {first_drop} of "
                    f"{training.epochs}, before it has reached {where}.lr={phase.lr}; warm up for fewer epochs, or "
                    f"set later {where}.milestones"
                )
            return phase.warmup
        # Scratch-B has always kept the recipe's warm-up as it is.
        warmup = phase.warmup if length == "scratch_b" else phase.warmup * training.epochs // phase.epochs
        # At least the last epoch before the first drop has the recipe's learning rate.
        return min(warmup, first_drop - 1)

    def image_flops(self, cost: Cost, *, taught: bool) -> int:
        """Return the FLOPs of training a network on one image, those of its teacher's forward pass included."""
        return cost.train_flops(1) + (self.large.forward_flops(1) if taught else 0)

    def train_flops(self, cost: Cost | None, phase: OptimizerSpec | None, *, taught: bool = False) -> int | None:
        """Return the FLOPs of a training; None if the network or the length is not known."""
        if cost is None or phase is None:
            return None
        return self.image_flops(cost, taught=taught) * phase.epochs * self.train_images

    def ledger(self, pruned: Cost | None) -> dict[str, object]:
        """Return the rule, and the numbers it is applied to where the pruned network is known."""
        if pruned is None:
            return {"rule": self.rule.name}
        return {
            "rule": self.rule.name,
            "base_epochs": self.base_epochs,
            "cap": self.rule.cap,
            "finetune_epochs_added": self.finetune_epochs,
            "params_unpruned": self.large.params,
            "macs_reference": self.macs_reference,
            "macs_pruned": pruned.macs,
            "macs_ratio": round(self.macs_reference / pruned.macs, 4),
        }
