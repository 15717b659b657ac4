"""A study is a list of stages: what will be done, in which order, from what, for how long, and at what cost.

The ledger of a dry run prints this list, the runner runs it, and the summary records it. Where the pruned network
follows from training, the arms are planned again when it is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.pruning import Target
from rethink_prune.study.arms import Length, arm_of, known_arm
from rethink_prune.study.budget import Budget
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.schedule import OptimizerSpec

Kind = Literal["large", "sparse", "prune", "finetune", "scratch"]

UNPRUNED = Architecture()


@dataclass(frozen=True)
class StageSpec:
    """One stage, before it runs.

    Attributes
    ----------
    title : str
        ``large``, ``sparse``, ``prune`` or the name of an arm.
    kind : {"large", "sparse", "prune", "finetune", "scratch"}
        What kind of work it is: the first part of its folder's name.
    parent : str, optional
        Title of the stage whose weights it starts from.
    teacher : str, optional
        Title of the stage whose network it learns from.
    given : bool
        Whether it takes weights the user brought, and trains nothing. Without these and a parent, weights are drawn.
    optimizer : OptimizerSpec, optional
        How it trains. None if it does not, or if its length follows from a pruned network that is not known yet.
    architecture : Architecture, optional
        What is left of the network it trains; None if that is not known yet.
    cost : Cost, optional
        Of that network.
    train_flops : int, optional
        Of this stage alone.
    key : mapping, optional
        What decides its result; None until the images are read and the architecture is known.
    also : tuple of str
        Further arms that are this very training, such as ``scratch@e`` beside ``scratch_e``.
    """

    title: str
    kind: Kind
    parent: str | None = None
    teacher: str | None = None
    given: bool = False
    optimizer: OptimizerSpec | None = None
    architecture: Architecture | None = None
    cost: Cost | None = None
    train_flops: int | None = None
    key: Mapping[str, Any] | None = None
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the stage: its title, and the further ones."""
        return (self.title, *self.also)

    @property
    def needs(self) -> tuple[str, ...]:
        """Titles of the stages whose weights it needs."""
        return tuple(title for title in (self.parent, self.teacher) if title is not None)


def needs_pruning(target: Target, arms: Sequence[str]) -> bool:
    """Tell whether a trained network has to be pruned: not for scratch arms whose architecture is known already."""
    return not target.known or any(arm_of(name).weights == "inherited" for name in arms)


def plan_study(
    budget: Budget, arms: Sequence[str], target: Target, *, trains_sparse: bool, baseline: bool, given: bool
) -> tuple[StageSpec, ...]:
    """Return the stages of a study, in the order in which they run.

    Parameters
    ----------
    budget : Budget
    arms : sequence of str
        Their names.
    target : Target
        What is to go from the unpruned network.
    trains_sparse : bool
        Whether the pruner trains the network its own way.
    baseline : bool
        Whether to train the unpruned network even if nothing needs it.
    given : bool
        Whether its weights were brought along.
    """
    stages = []
    prunes = needs_pruning(target, arms)
    large = _unpruned("large", "large", budget, "large", None)
    if baseline or prunes or any(arm_of(name).taught for name in arms):
        stages.append(replace(large, given=True, optimizer=None, train_flops=0) if given else large)
    if prunes and trains_sparse:
        stages.append(replace(large, title="sparse", kind="sparse"))
    if prunes:
        stages.append(StageSpec("prune", "prune", parent="sparse" if trains_sparse else "large", train_flops=0))
    known = (target.known_architecture, target.cost) if target.known else (None, None)
    return (*stages, *plan_arms(budget, arms, *known))


def plan_arms(
    budget: Budget, arms: Sequence[str], architecture: Architecture | None, pruned: Cost | None
) -> tuple[StageSpec, ...]:
    """Return the arms' stages; what follows from the pruned network is None as long as that is not known.

    Arms that turn out to be one training share a stage.

    Parameters
    ----------
    budget : Budget
    arms : sequence of str
        Their names.
    architecture, pruned
        The pruned network and its cost, if they are known.

    Raises
    ------
    UserError
        If an arm would train for less than one epoch, or as `Budget.optimizer`.

    Examples
    --------
    >>> from rethink_prune.config import BudgetConfig, Phase, RecipeConfig
    >>> recipe = RecipeConfig(name="short", epochs=10, lr=0.1, finetune=Phase(epochs=2, lr=0.01))
    >>> budget = Budget(recipe, BudgetConfig(name="paper"), Cost(80, 600), macs_reference=600, train_images=100)
    >>> [spec.optimizer.epochs for spec in plan_arms(budget, ["finetune", "scratch_b"], UNPRUNED, Cost(40, 300))]
    [2, 20]
    >>> [spec.optimizer is None for spec in plan_arms(budget, ["finetune", "scratch_b"], None, None)]
    [False, True]
    >>> [spec.names for spec in plan_arms(budget, ["scratch@10", "retrain@10", "scratch_e"], None, None)]
    [('scratch@10', 'scratch_e'), ('retrain@10',)]
    """
    stages: list[StageSpec] = []
    for name in arms:
        arm = arm_of(name)
        assert arm.length is not None
        if arm.network == "large":
            stages.append(_unpruned(name, "large", budget, arm.length, pruned))
            continue
        try:
            optimizer = budget.optimizer(arm.length, pruned, taught=arm.taught)
        except ValueError as error:
            raise UserError(f"arms: {name}: {error}") from None
        inherits = arm.weights == "inherited"
        stages.append(
            StageSpec(
                title=name,
                kind="finetune" if inherits else "scratch",
                parent="prune" if inherits else None,
                teacher="large" if arm.taught else None,
                optimizer=optimizer,
                architecture=architecture,
                cost=pruned,
                train_flops=budget.train_flops(pruned, optimizer, taught=arm.taught),
            )
        )
    return _merge_equal(stages)


def _merge_equal(stages: Sequence[StageSpec]) -> tuple[StageSpec, ...]:
    """Return one stage for each training, which keeps all its names."""
    merged: dict[object, StageSpec] = {}
    for spec in stages:
        # The network follows from the kind. A length that is not known yet is that of equal arms.
        length = spec.optimizer or arm_of(spec.title).length
        training = (spec.kind, spec.needs, length)
        first = merged.get(training)
        merged[training] = spec if first is None else replace(first, also=(*first.also, spec.title))
    return tuple(merged.values())


def plan_content(budget: Budget, stages: Sequence[StageSpec], target: Target, *, trains_sparse: bool) -> dict[str, Any]:
    """Return the content of ``plan.json``: the networks, and what every arm will train.

    What follows from a pruned network that is not known yet is None.
    """
    planned = {spec.title: spec for spec in stages}
    titles = {name: spec.title for spec in stages for name in spec.names if known_arm(name)}
    pruned = target.cost if target.known else None
    bases = {}
    for title in ("large", "sparse") if trains_sparse else ("large",):
        # The length is shown where nothing is trained, too: that of the arms follows from it.
        spec = planned.get(title)
        bases[title] = {
            **asdict(budget.large),
            **_length(budget.optimizer("large", None)),
            "train_flops": (spec and spec.train_flops) or 0,
            "trained": spec is not None and not spec.given,
        }
    layers = [asdict(layer) for layer in target.report().layers] if target.known else None
    networks = asdict(pruned) if pruned else {"params": None, "macs": None}
    return {
        **bases,
        "pruned": {**networks, "known": target.known, "layers": layers},
        "arms": {
            name: {
                **_length(planned[title].optimizer),
                "train_flops": planned[title].train_flops,
                # One training under two names is planned, and paid for, once.
                **({} if name == title else {"same_as": title}),
            }
            for name, title in titles.items()
        },
        "budget": budget.ledger(pruned),
    }


def _length(optimizer: OptimizerSpec | None) -> dict[str, Any]:
    if optimizer is None:
        return {"epochs": None, "milestones": None}
    return {"epochs": optimizer.epochs, "milestones": list(optimizer.milestones)}


def _unpruned(title: str, kind: Kind, budget: Budget, length: Length, pruned: Cost | None) -> StageSpec:
    """Return a stage that trains the unpruned network."""
    optimizer = budget.optimizer(length, pruned)
    return StageSpec(
        title,
        kind,
        optimizer=optimizer,
        architecture=UNPRUNED,
        cost=budget.large,
        train_flops=budget.train_flops(budget.large, optimizer),
    )
