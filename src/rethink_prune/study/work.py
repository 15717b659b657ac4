"""What each kind of stage does: train a network, take given weights, prune. The runner keeps what they make."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rethink_prune.cost import Cost, count_cost
from rethink_prune.errors import UserError
from rethink_prune.pruning import PRUNERS, PruneResult
from rethink_prune.pruning.pruner import LayerWidth
from rethink_prune.seeds import derive_generator, derive_seed, seeded
from rethink_prune.state import copied_state, full_state, load_full_state, same_value, sample_logits
from rethink_prune.store.stage import Done
from rethink_prune.store.weights import load_stage_weights
from rethink_prune.study.arms import arm_of
from rethink_prune.study.keys import shared_by_processes, stage_name
from rethink_prune.study.plan import UNPRUNED, StageSpec
from rethink_prune.study.prepare import PreparedStudy
from rethink_prune.study.product import Product, StageAccess
from rethink_prune.study.trial import UNSEEDED
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.distillation import Teacher
from rethink_prune.training.evaluate import evaluate
from rethink_prune.training.hooks import HeldMasks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress, Row
from rethink_prune.training.recalibrate import recalibrate
from rethink_prune.training.train import train

log = logging.getLogger(__name__)

# Of rows, beside losses and accuracies.
_COLUMNS = ("epoch", "lr", "images", "processes", "seconds")


def do_stage(
    study: PreparedStudy, interrupts: Interrupts, spec: StageSpec, parents: Sequence[Done], access: StageAccess
) -> Product:
    """Do the work of a stage, as the runner asks for it.

    Parameters
    ----------
    study : PreparedStudy
    interrupts : Interrupts
        Tells when to stop.
    spec : StageSpec
    parents : sequence of Done
        The stages it needs, as ``spec.needs`` names them.
    access : StageAccess
        Where the state of a training is kept.
    """
    if spec.given:
        return take_given(study)
    if spec.kind == "detect":
        from rethink_prune.study.detect import train_detection_stage  # needs torchvision, which is slow to import

        return train_detection_stage(study, interrupts, spec, parents, access, partial(_order, study))
    needed = {title: load_stage_weights(done.stage) for title, done in zip(spec.needs, parents, strict=True)}
    weights = needed[spec.parent] if spec.parent else None
    if spec.kind == "prune":
        before = Architecture.load(parents[0].stage.folder) if parents else UNPRUNED
        _check_positions(before, parents)
        return prune_network(study, spec.round, weights, before)
    assert spec.architecture is not None
    assert spec.cost is not None
    if spec.kind == "ticket":
        _check_positions(spec.architecture, parents)
        model = study.networks.ticket(spec.architecture, weights)
    elif weights is not None:
        model = study.networks.load(spec.architecture, weights)
    elif spec.kind == "scratch":
        model = study.networks.scratch(spec.architecture, dense=study.config.pruner.redraw == "dense")
    else:
        model = study.networks.large()
    teacher = study.networks.load(UNPRUNED, needed[spec.teacher]) if spec.teacher else None
    lr = _chosen_start(study, spec, model, parents)
    trained = spec
    if lr is not None and spec.optimizer is not None:
        trained = replace(spec, optimizer=replace(spec.optimizer, lr=lr, start=None))
    # The other processes build the same shapes; the weights reach them as the training starts.
    _order(study, trained)
    progress = train_stage(
        study,
        trained,
        model,
        interrupts,
        teacher=teacher,
        checkpoints=access.checkpoints,
        on_epoch=access.on_epoch,
    )
    flops = study.budget.image_flops(spec.cost, taught=spec.teacher is not None)
    result = _training_result(progress.rows, spec.cost, progress.seconds, flops_per_image=flops)
    if lr is not None:
        result["lr_start"] = lr
    if spec.until is not None and spec.key is not None:
        # These epochs are the first of that training, and are paid for there.
        whole = {name: value for name, value in spec.key.items() if name != "until"}
        result["part_of"] = stage_name("sparse" if study.pruner.trains_sparse else "large", whole)
    return Product(full_state(model), spec.architecture, result, sample_logits(model, study.inputs.image_shape))


def _chosen_start(study: PreparedStudy, spec: StageSpec, pruned: nn.Module, parents: Sequence[Done]) -> float | None:
    """Return the learning rate a stage starts from, where that follows from what pruning removed; None elsewhere."""
    optimizer, architecture = spec.optimizer, spec.architecture
    if optimizer is None or optimizer.start is None or architecture is None:
        return None
    # Its parent is the prune stage, and that one's the network that was pruned.
    unpruned = study.networks.load(UNPRUNED, load_stage_weights(parents[0].parents[0].stage))
    lr = optimizer.lr * optimizer.start.share(unpruned, pruned, architecture.masks)
    log.info("%s: starts at learning rate %.4g", spec.title, lr)
    return lr


@dataclass(frozen=True)
class Order:
    """A training that the first process wants the others to take part in; `shared` has to be the same for all."""

    spec: StageSpec
    shared: Mapping[str, str]


def _order(study: PreparedStudy, spec: StageSpec) -> None:
    study.processes.order(Order(spec, shared_by_processes(study.runtime.device.type, study.parts)))


def train_stage(
    study: PreparedStudy,
    spec: StageSpec,
    model: nn.Module,
    interrupts: Interrupts,
    *,
    teacher: nn.Module | None = None,
    checkpoints: Checkpoints | None = None,
    on_epoch: Callable[[list[Row]], None] = lambda rows: None,
) -> Progress:
    """Train a freshly built network in place, as a stage says; all processes that train together call this.

    Parameters
    ----------
    study, spec, model, interrupts
        As for `do_stage`.
    teacher : torch.nn.Module, optional
        The unpruned network, if it teaches; only the first process has to know its weights.
    checkpoints, on_epoch
        Of the first process alone.
    """
    assert spec.optimizer is not None
    assert spec.architecture is not None
    # The pruner takes part in its own training; in those of the arms, masked weights are held at zero.
    sparse = spec.kind == "sparse" or (spec.kind == "early" and study.pruner.trains_sparse)
    hooks = study.pruner.sparse(study.target) if sparse else HeldMasks(spec.architecture.masks)
    if study.config.sync_batchnorm:
        study.processes.share_norms(model, study.runtime.device)
    with seeded(derive_seed(study.config.seed, "prepare")):
        hooks.prepare(model)
    progress = train(
        model,
        study.inputs.train_batches,
        study.inputs.evaluations,
        spec.optimizer,
        runtime=study.runtime,
        hooks=hooks,
        seed=study.config.seed,
        checkpoints=checkpoints,
        interrupts=interrupts,
        processes=study.processes,
        teacher=None if teacher is None else Teacher(teacher, **study.config.recipe.distillation.model_dump()),
        until=spec.until,
        title=spec.title,
        on_epoch=on_epoch,
    )
    hooks.finish(model)
    return progress


def take_given(study: PreparedStudy) -> Product:
    """Evaluate the weights the user brought."""
    given = study.given
    assert given is not None
    start = time.monotonic()
    model = study.networks.load(UNPRUNED, given.state)
    result = {
        **_evaluation_result(study, model),
        **asdict(study.budget.large),
        **given.training_cost,
        "processes": given.result.get("processes", []),
        "seconds": time.monotonic() - start,
    }
    return Product(given.state, UNPRUNED, result, sample_logits(model, study.inputs.image_shape))


def prune_network(
    study: PreparedStudy, number: int, weights: Mapping[str, Tensor] | None, before: Architecture
) -> Product:
    """Prune a network, and evaluate what is left before any retraining.

    Parameters
    ----------
    study : PreparedStudy
    number : int
        Of the round, from 1.
    weights : mapping of str to Tensor, optional
        Of the network; by default, those of the unpruned one before any training.
    before : Architecture
        What earlier rounds left of it.
    """
    start = time.monotonic()
    model = study.networks.large() if weights is None else study.networks.load(before, weights)
    pruned = _ask_pruner(study, number, model, before)
    # Ours draw from the generator they are given; a user's own is asked twice, which costs little beside training.
    name = study.config.pruner.name
    if name not in PRUNERS:
        again = _ask_pruner(study, number, model, before)
        if not same_value(full_state(pruned.model), full_state(again.model)):
            raise UserError(f"pruner.name={name}: {UNSEEDED}")
    architecture, report = pruned.architecture, pruned.report
    if number > 1:
        architecture = architecture.after(before)
        # In terms of the unpruned network.
        full = {layer.layer: layer.full for layer in study.target.report().layers}
        report = replace(report, layers=tuple(replace(kept, full=full[kept.layer]) for kept in report.layers))
    # Taken before the evaluation moves the network to the device and changes its statistics.
    state = copied_state(pruned.model)
    evaluation = _evaluation_result(study, pruned.model)
    if recalibrate(pruned.model, study.inputs.recalibration(), runtime=study.runtime):
        evaluation["top1_recalibrated"] = _evaluation_result(study, pruned.model)["top1"]
        if study.config.pruner.recalibrate:
            state = {name: tensor.cpu() for name, tensor in full_state(pruned.model).items()}
        else:
            load_full_state(pruned.model, state)
    else:
        evaluation["top1_recalibrated"] = evaluation["top1"]
    result = {
        **evaluation,
        **asdict(count_cost(pruned.model, study.inputs.image_shape, masks=architecture.masks)),
        "report": asdict(report),
        "train_flops": 0,
        "epochs": 0,
        "seconds": time.monotonic() - start,
    }
    return Product(state, architecture, result, sample_logits(pruned.model, study.inputs.image_shape))


def _ask_pruner(study: PreparedStudy, number: int, model: nn.Module, before: Architecture) -> PruneResult:
    pruner, target = study.rounds.pruners[number - 1], study.target
    if len(study.rounds.pruners) > 1:
        # A round has a target of its own: what goes from the network as it is by now.
        masks = {"masks": before.masks} if before.masks else {}
        example = torch.zeros(1, *study.inputs.image_shape)
        target = pruner.target(model, example, study.config.model.name, **masks)
    # The first round draws what a single one does.
    return study.prune_with(pruner, model, target, *(() if number == 1 else (number,)))


def _check_positions(architecture: Architecture, parents: Sequence[Done]) -> None:
    """Raise `UserError` if it is not known which channels of the unpruned network remain."""
    if not architecture.has_positions:
        made = f"{parents[-1].stage.folder}: " if parents else ""
        raise UserError(
            f"{made}does not say which channels remain, so no ticket can be cut: made by an earlier version (remove "
            "that folder to prune again), or by a pruner whose architecture has no positions"
        )


@dataclass(frozen=True)
class PrunedNetwork:
    """The network that arms train, and what went; None for what follows from a training that failed."""

    report: Mapping[str, Any]
    architecture: Architecture | None = None
    cost: Cost | None = None


def pruned_network(study: PreparedStudy, pruned: Done | None) -> PrunedNetwork:
    """Return the network that a prune stage left; without one, what the options alone define."""
    if pruned is not None:
        cost = Cost(pruned.result["params"], pruned.result["macs"])
        return PrunedNetwork(pruned.result["report"], Architecture.load(pruned.stage.folder), cost)
    report = asdict(study.target.report())
    if not study.target.known:
        return PrunedNetwork(report)
    return PrunedNetwork(report, study.target.known_architecture.without_positions(), study.target.cost)


def shuffled_architecture(study: PreparedStudy, pruned: PrunedNetwork) -> Architecture | None:
    """Return the pruned architecture with what remains drawn at random; None where no arm trains it."""
    if pruned.architecture is None or not any(arm_of(name).shuffled for name in study.config.arms):
        return None
    layers = [LayerWidth(**layer) for layer in pruned.report["layers"]]
    return study.target.reshuffled(layers, derive_generator(study.config.seed, "reshuffle"))


def _evaluation_result(study: PreparedStudy, model: nn.Module) -> dict[str, float | None]:
    found = evaluate(study.runtime.place(model), study.inputs.evaluations["test"], runtime=study.runtime)
    top5 = {} if found.top5 is None else {"top5": found.top5}
    # A pruned network's logits can overflow before it is retrained, and JSON has no infinity.
    return {"top1": found.top1, **top5, "loss": found.loss if math.isfinite(found.loss) else None}


def _training_result(rows: Sequence[Row], cost: Cost, seconds: float, *, flops_per_image: int) -> dict[str, Any]:
    """Return what a finished training records: the last epoch's numbers, and the best epoch's as the paper has them."""
    last = rows[-1]
    best = max(rows, key=lambda row: row["test_top1"])
    result: dict[str, Any] = {
        "top1": last["test_top1"],
        **({"top5": last["test_top5"]} if "test_top5" in last else {}),
        "top1_best": best["test_top1"],
        "best_epoch": int(best["epoch"]),
        "loss": last["test_loss"],
        "epochs": len(rows),
        "processes": sorted({int(row.get("processes", 1)) for row in rows}),
        **asdict(cost),
        "train_flops": flops_per_image * sum(int(row["images"]) for row in rows),
        "seconds": seconds,
    }
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in _COLUMNS and not name.endswith(("_loss", "_top1", "_top5")):  # what hooks noticed
            values = [row[name] for row in rows if name in row]
            result[name] = sum(values) / len(values)
    if "validation_top1" in last:
        selected = max(rows, key=lambda row: row["validation_top1"])
        result["top1_selected"] = selected["test_top1"]
        result["selected_epoch"] = int(selected["epoch"])
    return result
