"""What the results of stages depend on, as pure functions: stage keys, and what the report compares runs by.

A key holds exactly what decides a stage's result. Paths, workers, devices, log settings and the list of arms are in no
key. An option that came later enters a key only where it is used and differs from its default, so that the stages of
earlier versions stay valid.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rethink_prune.config import HUB_OPTIONS, StudyConfig
from rethink_prune.imports import source_digest
from rethink_prune.models import model_factory
from rethink_prune.models.initialisers import initialiser
from rethink_prune.pruning import PRUNERS, Pruner
from rethink_prune.pruning.rounds import Rounds
from rethink_prune.study.arms import arm_of
from rethink_prune.study.inputs import Inputs
from rethink_prune.study.networks import Networks
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.pretrained import Checkpoint
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.schedule import OptimizerSpec

# Options that came after the first stages were stored.
_LATER_OPTIONS = {"warmup", "decay_norms", "label_smoothing", "start", "passed"}


@dataclass(frozen=True)
class KeyParts:
    """What the keys of a study's stages are made of; `key_parts` makes it.

    Attributes
    ----------
    training : mapping
        What the keys of all trainings have in common: ``data``, ``training``, ``seed``, ``network``.
    rounds : tuple of mapping
        What decides what goes in each round, given the network's weights.
    sparse : mapping, optional
        What the pruner's own training adds.
    given : mapping, optional
        What decides the result of weights the user brought: they are evaluated on the test images.
    distillation : mapping
        How arms with a teacher learn from it.
    redraw : {"nonzeros", "dense"}
        How scratch arms draw weights.
    resolved : mapping
        What options of the pruner that name files stand for.
    """

    training: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    sparse: Mapping[str, Any] | None
    given: Mapping[str, Any] | None
    distillation: Mapping[str, Any]
    redraw: str = "nonzeros"
    resolved: Mapping[str, Any] = field(default_factory=dict)


def key_parts(
    config: StudyConfig,
    inputs: Inputs,
    networks: Networks,
    init: str | None,
    pruner: Pruner,
    rounds: Rounds,
    given: Checkpoint | None,
) -> KeyParts:
    """Return what the keys of a study's stages are made of.

    Parameters
    ----------
    config : StudyConfig
    inputs : Inputs
        Has the images, which are read for their fingerprint, and the precision in which is computed.
    networks : Networks
        Has the options that networks are built with.
    init : str, optional
        Name of the network's initialiser.
    pruner : Pruner
    rounds : Rounds
        What is to go: the pruner's own training, if it has one, depends on it.
    given : Checkpoint, optional
        Weights of the unpruned network that the user brought.
    """
    name, dataset, recipe, batch_size = config.model.name, config.dataset, config.recipe, config.recipe.batch_size
    info, fingerprint, precision = inputs.info, inputs.dataset.fingerprint, inputs.runtime.precision
    augment = {"pad": dataset.pad, "flip": dataset.flip} if recipe.augment else None
    data = {
        "fingerprint": fingerprint,
        "augment": augment,
        **({"rand_augment": recipe.rand_augment} if recipe.rand_augment else {}),  # came later
    }
    network = {
        "name": name,
        "options": dict(networks.build_options),
        "init": init,
        "num_classes": info.num_classes,
        "in_channels": info.channels,
        "image_size": info.image_size,
        # A user's own code counts by its files.
        "source": source_digest(model_factory(name), name) if ":" in name else None,
    }
    if ":" in (init or ""):
        network["init_source"] = source_digest(initialiser(str(init)), str(init))
    source = None if config.pruner.name in PRUNERS else source_digest(type(pruner), config.pruner.name)
    evaluation = {"network": network, "fingerprint": fingerprint, "precision": precision}
    resolved = rounds.target.resolved()
    hooks = pruner.sparse(rounds.target) if pruner.trains_sparse else None

    def pruning(step: Pruner) -> dict[str, Any]:
        options = step.options.key()
        return {
            **options,
            **resolved,
            **({"revision": step.revision} if step.revision > 1 else {}),
            "source": source,
            "seed": config.seed,
            # An option of the same name says how many are sampled.
            **({"sampled": options["images"]} if "images" in options else {}),
            "images": {**data, "batch_size": batch_size} if step.needs_data else None,
            # It has no parent whose key would tell.
            **(evaluation if step.at_start else {}),
        }

    training = {
        "batch_size": batch_size,
        "precision": precision,
        # Came later. Pruners see images that are not mixed.
        **{name: alpha for name, alpha in (("mixup", recipe.mixup), ("cutmix", recipe.cutmix)) if alpha},
        **({} if config.sync_batchnorm else {"sync_batchnorm": False}),
    }
    return KeyParts(
        training={"data": data, "training": training, "seed": config.seed, "network": network},
        rounds=tuple(pruning(step) for step in rounds.pruners),
        sparse={"name": config.pruner.name, "source": source, **hooks.key} if hooks else None,
        given={"checkpoint": given.digest, "known": given.training_cost, **evaluation} if given else None,
        distillation=recipe.distillation.model_dump(),
        redraw=config.pruner.redraw,
        resolved=resolved,
    )


def add_keys(stages: Sequence[StageSpec], parts: KeyParts, names: Mapping[str, str]) -> tuple[StageSpec, ...]:
    """Return stages with their keys, as far as what they depend on is known.

    Parameters
    ----------
    stages : sequence of StageSpec
        Each behind the stage it starts from.
    parts : KeyParts
    names : mapping of str to str
        Names of stages that were done before these, by title.
    """
    names = dict(names)
    keyed = []
    for spec in stages:
        if names.keys() >= set(spec.needs):
            spec = replace(spec, key=stage_key(spec, parts, names))
        if spec.key is not None:
            names[spec.title] = stage_name(spec.kind, spec.key)
        keyed.append(spec)
    return tuple(keyed)


def stage_key(spec: StageSpec, parts: KeyParts, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what decides a stage's result; None if its length or its architecture is not known yet.

    Parameters
    ----------
    spec : StageSpec
    parts : KeyParts
    names : mapping of str to str
        Names of the stages it needs, by title.
    """
    parent = names[spec.parent] if spec.parent else None
    if spec.kind == "prune":
        return {"parent": parent, "pruner": dict(parts.rounds[spec.round - 1])}
    if spec.given:
        return dict(parts.given or {})
    if spec.optimizer is None or spec.architecture is None:
        return None
    trains_own_way = spec.kind == "sparse" or (spec.kind == "early" and parts.sparse is not None)
    # What is not part of these was no stage of earlier versions.
    extra: dict[str, Any] = {}
    if spec.teacher:
        extra["teacher"] = {"stage": names[spec.teacher], **parts.distillation}
    if spec.kind == "ticket":
        extra["positions"] = names[spec.chosen_by] if spec.chosen_by else "random"
    if spec.kind == "early":
        extra["until"] = spec.until
    if spec.kind == "scratch" and parts.redraw != "nonzeros":
        extra["redraw"] = parts.redraw
    return {
        **parts.training,
        "training": {**optimizer_key(spec.optimizer), **parts.training["training"]},
        "architecture": architecture_key(spec.architecture),
        "parent": parent,
        "pruner": parts.sparse if trains_own_way else None,
        **extra,
    }


def stage_name(kind: str, key: Mapping[str, Any]) -> str:
    """Return the name of a stage's folder: its kind, and 16 hexadecimal digits of a hash of its key.

    Examples
    --------
    >>> stage_name("large", {"seed": 0, "model": "vgg16"}) == stage_name("large", {"model": "vgg16", "seed": 0})
    True
    """
    text = json.dumps({"kind": kind, **key}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def optimizer_key(spec: OptimizerSpec) -> dict[str, Any]:
    """Return the options of an optimiser and its schedule that decide a training.

    Examples
    --------
    >>> spec = OptimizerSpec("sgd", 0.1, 0.9, False, 1e-4, "cosine", epochs=8, milestones=(), gammas=(), warmup=2)
    >>> sorted(set(optimizer_key(spec)) & {"lr", "warmup", "label_smoothing"})
    ['lr', 'warmup']
    """
    unused = {name for name in _LATER_OPTIONS if getattr(spec, name) == getattr(OptimizerSpec, name)}
    return {name: value for name, value in asdict(spec).items() if name not in unused}


def architecture_key(architecture: Architecture) -> dict[str, Any]:
    """Return an architecture as plain values; its masks, which are large, by their SHA-256.

    Examples
    --------
    >>> architecture_key(Architecture(removed=("layer1.1.conv2",)))["removed"]
    ('layer1.1.conv2',)
    """
    masks = {name: hashlib.sha256(mask.numpy().tobytes()).hexdigest() for name, mask in architecture.masks.items()}
    return {
        "modules": architecture.modules,
        "edits": architecture.edits,
        "selections": {name: indexes.tolist() for name, indexes in architecture.selections.items()},
        "removed": architecture.removed,
        **({"parameters": architecture.parameters} if architecture.parameters else {}),  # came later
        "masks": masks,
    }


def settings(config: StudyConfig, parts: KeyParts) -> dict[str, Any]:
    """Return what results depend on beside the seed, in full: the report does not mix runs that differ in it."""
    # Of a set that `datasets` loads, the fingerprint holds what its options choose.
    dataset = config.dataset.model_dump(mode="json", exclude={"root", "workers", *HUB_OPTIONS})
    return {
        "dataset": {**dataset, "fingerprint": parts.training["data"]["fingerprint"]},
        "model": parts.training["network"],
        # In full: what is not recorded would agree with any value.
        "pruner": {**config.pruner.model_dump(mode="json"), **parts.resolved, "source": parts.rounds[0]["source"]},
        # The strength that was chosen is among the pruner's options.
        "recipe": config.recipe.model_dump(mode="json", exclude={"eval_batch_size", "strengths"}),
        "budget": config.budget.model_dump(mode="json"),
        "large": {"checkpoint": parts.given["checkpoint"] if parts.given else None},
        "sync_batchnorm": config.sync_batchnorm,
        **({"rewind": config.rewind.model_dump()} if rewinds(config) else {}),
    }


def rewinds(config: StudyConfig) -> bool:
    """Tell whether some training of a study depends on the options ``rewind``."""
    arms = map(arm_of, config.arms)
    between = config.pruner.rounds is not None and config.pruner.between_rounds == "epoch"
    return between or any(arm.weights == "early" or arm.length == "rewind" for arm in arms)


def shared_by_processes(device_type: str, parts: KeyParts) -> dict[str, str]:
    """Return what processes that train together must not differ in, as an error names it."""
    return {
        "device": device_type,
        "precision": parts.training["training"]["precision"],
        "the dataset's fingerprint": parts.training["data"]["fingerprint"],
        "the network's source": str(parts.training["network"]["source"]),
        "the pruner's source": str(parts.rounds[0]["source"]),
    }
