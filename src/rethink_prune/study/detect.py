"""The work of a detection stage: build a detector around a network of the study, train it, and judge it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from rethink_prune.config import TARGET_OPTIONS, PrunerOptions
from rethink_prune.cost import Cost
from rethink_prune.detection.batches import TestPictures, TrainPictures
from rethink_prune.detection.detector import (
    DetectorSpec,
    build_detector,
    classifier_state,
    detector_masks,
    narrowed_state,
    sampled_part,
)
from rethink_prune.detection.drawing import draw_detections
from rethink_prune.detection.task import AP, Detection, DetectorHooks
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.state import full_state, load_full_state, sample_logits
from rethink_prune.store.stage import Done, Failed
from rethink_prune.store.weights import load_stage_weights
from rethink_prune.study.plan import UNPRUNED, StageSpec
from rethink_prune.study.prepare import PreparedStudy
from rethink_prune.study.product import Product, StageAccess
from rethink_prune.study.transfer import PREFIX, PRUNE_D, Transfer, transfer_key
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress, Row
from rethink_prune.training.train import train


def run_detection(
    study: PreparedStudy, spec: StageSpec, done: Mapping[str, Done], run: Callable[[StageSpec], Done | Failed]
) -> Done | Failed:
    """Run a detection stage, whose key follows from the weights that it starts from.

    Parameters
    ----------
    study : PreparedStudy
    spec : StageSpec
        Without its key.
    done : mapping of str to Done
        The stages so far, by title.
    run : callable
        Runs a stage.
    """
    parent = done.get(str(spec.parent))
    if parent is None or spec.architecture is None:
        return Failed(f"{spec.parent} failed, so there is no network to start from")
    dataset = study.inputs.dataset
    own: dict[str, Any] = {"images": {"mean": list(dataset.mean), "std": list(dataset.std)}}
    if spec.title == f"{PREFIX}{PRUNE_D}":
        own["pruner"] = dict(study.parts.rounds[-1])
        if not study.target.known:
            spec = replace(spec, chosen_by="prune")
            own["widths"] = done["prune"].stage.digest
    return run(replace(spec, key=transfer_key(spec, parent, _transfer(study), study.parts, own)))


def detector_spec(study: PreparedStudy) -> DetectorSpec:
    """Return what the detectors of a study are built for."""
    return _transfer(study).spec(study.inputs.dataset.mean, study.inputs.dataset.std)


def _transfer(study: PreparedStudy) -> Transfer:
    assert study.transfer is not None
    return study.transfer


def train_detection_stage(
    study: PreparedStudy,
    interrupts: Interrupts,
    spec: StageSpec,
    parents: Sequence[Done],
    access: StageAccess,
    order: Callable[[StageSpec], None],
) -> Product:
    """Do the work of a detection stage; `order` asks the other processes to take part in its training."""
    architecture, cost = spec.architecture, spec.cost
    assert architecture is not None
    assert cost is not None
    weights = load_stage_weights(parents[0].stage)
    if spec.title == f"{PREFIX}{PRUNE_D}":
        detector, architecture = _pruned_detector(study, architecture, weights, parents)
        spec = replace(spec, architecture=architecture)
    else:
        detector = _new_detector(study, study.networks.load(architecture, weights))
    order(spec)
    progress = train_detector(study, spec, detector, interrupts, access=access)
    pictures = TestPictures(_transfer(study).data.test, _transfer(study).options.batch_size, study.runtime.device)
    drawn = draw_detections(detector, pictures, _transfer(study).data.test.classes, runtime=study.runtime)
    images = sum(int(row["images"]) for row in progress.rows)
    result = _detection_result(progress.rows, cost, progress.seconds, train_flops=cost.train_flops(images))
    sample = sample_logits(sampled_part(detector), study.inputs.image_shape)
    return Product(full_state(detector), architecture, result, sample, drawn)


def join_detection_stage(study: PreparedStudy, spec: StageSpec, interrupts: Interrupts) -> None:
    """Take part in the training of a detector that the first process runs."""
    assert spec.architecture is not None
    detector = _new_detector(study, reshape(study.networks.large(), spec.architecture))
    train_detector(study, spec, detector, interrupts)


def train_detector(
    study: PreparedStudy,
    spec: StageSpec,
    detector: nn.Module,
    interrupts: Interrupts,
    *,
    access: StageAccess | None = None,
) -> Progress:
    """Train a detector in place; all processes that train together call this, the first one with `access`."""
    assert spec.optimizer is not None
    assert spec.architecture is not None
    transfer, device, seed = _transfer(study), study.runtime.device, study.config.seed
    options, data = transfer.options, transfer.data
    hooks = DetectorHooks(detector_masks(detector, spec.architecture.masks), options.clip_norm)
    hooks.prepare(detector)
    return train(
        detector,
        TrainPictures(data.train, options.batch_size, options.flip, seed, device),
        {"test": TestPictures(data.test, options.batch_size, device)},
        spec.optimizer,
        runtime=study.runtime,
        hooks=hooks,
        seed=seed,
        checkpoints=access.checkpoints if access else None,
        interrupts=interrupts,
        processes=study.processes,
        task=Detection(data.test.classes),
        title=spec.title,
        on_epoch=access.on_epoch if access else lambda rows: None,
    )


def _new_detector(study: PreparedStudy, classifier: nn.Module) -> nn.Module:
    """Build a detector whose own layers are drawn: the same draws for every network."""
    with seeded(derive_seed(study.config.seed, "detector-init")):
        return build_detector(classifier, detector_spec(study))


def _pruned_detector(
    study: PreparedStudy, expected: Architecture, weights: Mapping[str, Tensor], parents: Sequence[Done]
) -> tuple[nn.Module, Architecture]:
    """Put the layers of a trained detector back into the classifier, prune that, and build the detector around it."""
    # The detector's parent is the unpruned network, whose last layer is in no detector.
    large = load_stage_weights(parents[0].parents[0].stage)
    classifier = study.networks.load(UNPRUNED, classifier_state(weights, large))
    # How much goes follows from the options, or was found by a pruning of the study.
    layers = parents[1].result["report"]["layers"] if len(parents) > 1 else map(asdict, study.target.report().layers)
    pruner = type(study.pruner)(_pinned(study.config.pruner, {layer["layer"]: layer["kept"] for layer in layers}))
    pruner.seed = study.config.seed
    example = torch.zeros(1, *study.inputs.image_shape)
    target = pruner.target(classifier, example, study.config.model.name)
    pruned = study.prune_with(pruner, classifier, target)
    if pruned.architecture.modules != expected.modules:
        raise UserError(f"transfer: {PRUNE_D}: the detector was pruned to other widths than the study's networks")
    of = detector_spec(study)
    before, after = of.split(classifier), of.split(pruned.model)
    detector = _new_detector(study, pruned.model)
    state = narrowed_state(weights, detector, before=before, after=after, architecture=pruned.architecture)
    load_full_state(detector, state)
    return detector, pruned.architecture


def _pinned(options: PrunerOptions, widths: Mapping[str, int]) -> PrunerOptions:
    """Return a pruner's options with these widths as their target."""
    fields = type(options).model_fields
    bounds = {
        name: fields[name].default for name in ("skip", "min_channels", "min_share", "round_to") if name in fields
    }
    targets = {name: None for name in TARGET_OPTIONS if name in fields}
    rounds = {"rounds": None, "share_per_round": None, "between_rounds": "init"}
    return type(options).model_validate({**options.model_dump(), **bounds, **targets, **rounds, "widths": widths})


def _detection_result(rows: Sequence[Row], cost: Cost, seconds: float, *, train_flops: int) -> dict[str, Any]:
    last, best = rows[-1], max(rows, key=lambda row: row["test_map"])
    coco = {name.removeprefix("test_coco_"): value for name, value in last.items() if name.startswith("test_coco_")}
    ap = f"test_{AP}"
    return {
        "map": last["test_map"],
        "map_best": best["test_map"],
        "best_epoch": int(best["epoch"]),
        "ap": {name.removeprefix(ap): value for name, value in last.items() if name.startswith(ap)},
        **({"coco": coco} if coco else {}),
        "loss": last["train_loss"],
        "epochs": len(rows),
        "processes": sorted({int(row.get("processes", 1)) for row in rows}),
        **asdict(cost),
        "train_flops": train_flops,
        "seconds": seconds,
    }
