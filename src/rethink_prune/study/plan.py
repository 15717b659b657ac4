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
from rethink_prune.pruning.rounds import Rounds
from rethink_prune.study.arms import BETWEEN_ROUNDS, Length, Weights, arm_of, known_arm
from rethink_prune.study.budget import Budget
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.schedule import OptimizerSpec

Kind = Literal["large", "sparse", "early", "prune", "finetune", "scratch", "ticket", "detect"]

UNPRUNED = Architecture()


@dataclass(frozen=True)
class StageSpec:
    """One stage, before it runs.

    Attributes
    ----------
    title : str
        ``large``, ``sparse``, ``early``, ``prune`` or the name of an arm; in rounds also ``prune_1`` and ``round_1``,
        the training that follows it.
    kind : {"large", "sparse", "early", "prune", "finetune", "scratch", "ticket", "detect"}
        What kind of work it is: the first part of its folder's name. ``early`` is the unpruned network some epochs
        after its start, ``ticket`` a pruned one with the weights it had then, ``detect`` a detector around one.
    parent : str, optional
        Title of the stage whose weights it starts from.
    teacher : str, optional
        Title of the stage whose network it learns from.
    chosen_by : str, optional
        Of a ticket, or of a detector that is pruned: title of the prune stage that chose what remains.
    round : int
        Of a prune stage: which round, from 1.
    until : int, optional
        Epochs after which it stops, where the training goes on.
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
    chosen_by: str | None = None
    round: int = 1
    until: int | None = None
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
        """Titles of the stages it needs."""
        return tuple(title for title in (self.parent, self.teacher, self.chosen_by) if title is not None)


def needs_pruning(target: Target, arms: Sequence[str]) -> bool:
    """Tell whether a network has to be pruned: not for arms that draw what they need, of a known architecture."""
    return not target.known or any(arm_of(name).follows_training for name in arms)


def plan_study(
    budget: Budget,
    arms: Sequence[str],
    rounds: Rounds,
    *,
    between: str = "init",
    trains_sparse: bool = False,
    at_start: bool = False,
    baseline: bool = False,
    given: bool = False,
) -> tuple[StageSpec, ...]:
    """Return the stages of a study, in the order in which they run.

    Parameters
    ----------
    budget : Budget
    arms : sequence of str
        Their names.
    rounds : Rounds
        What is to go from the unpruned network.
    between : {"init", "epoch", "none"}
        How it is trained between two rounds.
    trains_sparse : bool
        Whether the pruner trains the network its own way.
    at_start : bool
        Whether it prunes the network before any training.
    baseline : bool
        Whether to train the unpruned network even if nothing needs it.
    given : bool
        Whether its weights were brought along.
    """
    stages = []
    target = rounds.target
    prunes = needs_pruning(target, arms)
    in_rounds = prunes and len(rounds.pruners) > 1
    large = _unpruned("large", "large", budget, "large", None)
    if baseline or (prunes and not at_start) or any(arm_of(name).taught for name in arms):
        stages.append(replace(large, given=True, optimizer=None, train_flops=0) if given else large)
    if prunes and trains_sparse:
        stages.append(replace(large, title="sparse", kind="sparse"))
    rewinds = any(arm_of(name).weights == "early" for name in arms) or (in_rounds and between == "epoch")
    if rewinds and budget.early_epochs:
        flops = large.train_flops and large.train_flops * budget.early_epochs // budget.recipe.epochs
        stages.append(replace(large, title="early", kind="early", until=budget.early_epochs, train_flops=flops))
    if prunes:
        parent = None if at_start else "sparse" if trains_sparse else "large"
        for number in range(1, len(rounds.pruners)):
            stages.append(StageSpec(f"prune_{number}", "prune", parent=parent, round=number, train_flops=0))
            known = rounds.targets[number - 1] if rounds.targets else None
            stages.append(plan_between(budget, number, between, *_known(known)))
            parent = stages[-1].title
        stages.append(StageSpec("prune", "prune", parent=parent, round=len(rounds.pruners), train_flops=0))
    return (*stages, *plan_arms(budget, arms, *_known(target)))


def _known(target: Target | None) -> tuple[Architecture, Cost] | tuple[None, None]:
    return (target.known_architecture, target.cost) if target is not None and target.known else (None, None)


def plan_between(
    budget: Budget, number: int, between: str, architecture: Architecture | None, pruned: Cost | None
) -> StageSpec:
    """Return the training between a round and the next: that of an arm of a study that ends with this round.

    Parameters
    ----------
    budget : Budget
    number : int
        Of the round, from 1.
    between : {"init", "epoch", "none"}
    architecture, pruned
        The network that the round left and its cost, if they are known.
    """
    spec = _plan_arm(budget, BETWEEN_ROUNDS[between], architecture, pruned)
    prune = f"prune_{number}"
    return replace(
        spec,
        title=f"round_{number}",
        parent=prune if spec.parent == "prune" else spec.parent,
        chosen_by=prune if spec.chosen_by else None,
    )


def plan_arms(
    budget: Budget,
    arms: Sequence[str],
    architecture: Architecture | None,
    pruned: Cost | None,
    *,
    shuffled: Architecture | None = None,
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
    shuffled : Architecture, optional
        The same with what remains drawn at random, for arms that train it.

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
    return _merge_equal(
        [_plan_arm(budget, name, shuffled if arm_of(name).shuffled else architecture, pruned) for name in arms]
    )


def _plan_arm(budget: Budget, name: str, architecture: Architecture | None, pruned: Cost | None) -> StageSpec:
    arm = arm_of(name)
    assert arm.length is not None
    if arm.network == "large":
        return _unpruned(name, "large", budget, arm.length, pruned)
    try:
        optimizer = budget.optimizer(arm.length, pruned, taught=arm.taught)
    except ValueError as error:
        raise UserError(f"arms: {name}: {error}") from None
    kinds: Mapping[Weights, Kind] = {
        "inherited": "finetune",
        "fresh": "scratch",
        "initial": "ticket",
        "early": "ticket",
    }
    parents = {"inherited": "prune", "early": "early" if budget.early_epochs else None}
    return StageSpec(
        title=name,
        kind=kinds[arm.weights],
        parent=parents.get(arm.weights),
        teacher="large" if arm.taught else None,
        chosen_by="prune" if kinds[arm.weights] == "ticket" and not arm.shuffled else None,
        optimizer=optimizer,
        architecture=architecture,
        cost=pruned,
        train_flops=budget.train_flops(pruned, optimizer, taught=arm.taught),
    )


def _merge_equal(stages: Sequence[StageSpec]) -> tuple[StageSpec, ...]:
    """Return one stage for each training, which keeps all its names."""
    merged: dict[object, StageSpec] = {}
    for spec in stages:
        # The network follows from the kind. A length that is not known yet is that of equal arms.
        length = spec.optimizer or arm_of(spec.title).length
        training = (spec.kind, spec.needs, length, arm_of(spec.title).shuffled)
        first = merged.get(training)
        merged[training] = spec if first is None else replace(first, also=(*first.also, spec.title))
    return tuple(merged.values())


def plan_content(
    budget: Budget,
    stages: Sequence[StageSpec],
    target: Target,
    *,
    trains_sparse: bool,
    detection: Sequence[StageSpec] = (),
) -> dict[str, Any]:
    """Return the content of ``plan.json``: the networks, and what every arm will train.

    What follows from a pruned network that is not known yet is None.
    """
    planned = {spec.title: spec for spec in (*stages, *detection)}
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
    between = {
        spec.title: {**_length(spec.optimizer), "train_flops": spec.train_flops}
        for spec in stages
        if spec.title == "early" or spec.title.startswith("round_")
    }
    if "early" in between:
        between["early"]["epochs"] = budget.early_epochs
    layers = [asdict(layer) for layer in target.report().layers] if target.known else None
    networks = asdict(pruned) if pruned else {"params": None, "macs": None}
    return {
        **bases,
        "pruned": {**networks, "known": target.known, "layers": layers},
        **({"before_arms": between} if between else {}),
        "arms": {
            name: {
                **_length(planned[title].optimizer),
                "train_flops": planned[title].train_flops,
                "train_flops_total": _planned_total(planned, title),
                # One training under two names is planned, and paid for, once.
                **({} if name == title else {"same_as": title}),
            }
            for name, title in titles.items()
        },
        **({"transfer": {spec.title: _planned_detector(spec, planned) for spec in detection}} if detection else {}),
        "budget": budget.ledger(pruned),
    }


def _planned_detector(spec: StageSpec, planned: Mapping[str, StageSpec]) -> dict[str, Any]:
    cost = {"params": None, "macs": None} if spec.cost is None else asdict(spec.cost)
    flops = {"train_flops": spec.train_flops, "train_flops_total": _planned_total(planned, spec.title)}
    return {**_length(spec.optimizer), **flops, **cost, "starts_from": spec.parent}


def _planned_total(planned: Mapping[str, StageSpec], title: str) -> int | None:
    """Return the FLOPs of a stage and of those it builds on; None if some are not known, as for given weights."""
    found: dict[str, int | None] = {}
    waiting = [title]
    while waiting:
        spec = planned[waiting.pop()]
        found[spec.title] = None if spec.given else spec.train_flops
        waiting += spec.needs
    if {"large", "sparse"} & found.keys():
        # Its epochs are the first of that training.
        found.pop("early", None)
    known = [flops for flops in found.values() if flops is not None]
    return sum(known) if len(known) == len(found) else None


def _length(optimizer: OptimizerSpec | None) -> dict[str, Any]:
    if optimizer is None:
        return {"epochs": None, "milestones": None}
    passed = optimizer.passed
    return {"epochs": optimizer.epochs, "milestones": [m - passed for m in optimizer.milestones if m > passed]}


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
