"""What a configuration means on this machine: device, data, networks, target, budget and stage keys."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rethink_prune.config import StudyConfig
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.data import (
    EvalBatches,
    ImageDataset,
    TrainBatches,
    describe_dataset,
    eval_batches,
    load_dataset,
    train_batches,
)
from rethink_prune.errors import UserError
from rethink_prune.models import asked_options, build_model, model_factory
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.pruning import PRUNERS, Target, find_pruner
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.store.stages import Store
from rethink_prune.study.arms import ARMS
from rethink_prune.study.budget import Budget, Training, phase_training
from rethink_prune.study.keys import source_digest
from rethink_prune.study.pretrained import Checkpoint, read_checkpoint
from rethink_prune.surgery.cut import Architecture, reshape
from rethink_prune.surgery.masks import draw_masked
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.precision import describe_device, prepare_device, resolve_device, resolve_precision
from rethink_prune.training.train import Runtime


class Setup:
    """A validated configuration, resolved; making one checks everything that can be wrong before any training.

    Parameters
    ----------
    config : StudyConfig
    processes : Processes
        Those that train together.

    Raises
    ------
    UserError
        If the parts of the configuration do not fit each other, the data or the machine.
    """

    def __init__(self, config: StudyConfig, processes: Processes = ALONE) -> None:
        self.config = config
        self.processes = processes
        if processes.world > 1 and config.recipe.batch_size < 2 * processes.world:
            raise UserError(
                f"recipe.batch_size={config.recipe.batch_size}: too few for {processes.world} processes, which need "
                f"two images each; start at most {max(1, config.recipe.batch_size // 2)}"
            )
        device = resolve_device(config.device, processes)
        precision = resolve_precision(config.precision, device)
        self.runtime = Runtime(
            device=device,
            precision=precision,
            accelerate=config.accelerate,
            checkpoint_seconds=config.store.checkpoint_seconds,
            show_progress=sys.stderr.isatty() and processes.is_first,
        )
        prepare_device(device, deterministic=config.deterministic)
        self.info = describe_dataset(config.dataset)
        self.image_shape = (self.info.channels, self.info.image_size, self.info.image_size)
        self.pruner = find_pruner(config.pruner.name)(config.pruner)
        if config.model.init not in (None, *INITIALISERS):
            raise UserError(f"model.init={config.model.init}: no such initialiser; one of {', '.join(INITIALISERS)}")
        model = self.build()
        self.init = self._check_init(model)
        self._check_output(model)
        self.target: Target = self.pruner.target(model, torch.zeros(1, *self.image_shape), config.model.name)
        if self.prunes:
            self.pruner.check_images(self.target, self.info.train_images)
        self.cost = self.target.full_cost
        self.checkpoint: Checkpoint | None = None
        if config.large.checkpoint is not None:
            self.checkpoint = read_checkpoint(config.large.checkpoint, model, config.model.name)
        self._macs_reference = self._reference_macs()
        self.store = Store(Path(config.store.root))
        self.store.check()

    @property
    def device_name(self) -> str:
        """The device, as a person would call it."""
        return describe_device(self.runtime.device)

    @property
    def precision_note(self) -> str:
        """The arithmetic, and whether it was chosen here."""
        chosen = f"precision {self.runtime.precision}"
        return f"{chosen} (auto)" if self.config.precision == "auto" else chosen

    @property
    def prunes(self) -> bool:
        """Whether any arm needs a trained network to be pruned; scratch arms of a known target do not."""
        return not self.target.known or any(ARMS[name].weights == "inherited" for name in self.config.arms)

    @property
    def reads_large(self) -> bool:
        """Whether anything needs the unpruned network; what is trained sparsely is compared with it."""
        return self.config.large.baseline or self.prunes

    def budget(self, macs_pruned: int) -> Budget:
        """Return the lengths of all trainings for a pruned network of so many MACs."""
        return Budget(self.config.recipe, self.config.budget, self._macs_reference, macs_pruned)

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images."""
        cache, progress = self.store.cache, self.runtime.show_progress
        load = partial(load_dataset, self.config.dataset, cache_dir=cache, progress=progress)
        return self.processes.one_after_another(load)

    @cached_property
    def train_batches(self) -> TrainBatches:
        """The training images, kept on the device or streamed to it, augmented as the recipe says."""
        return train_batches(
            self.dataset,
            self.config.dataset,
            batch_size=self.config.recipe.batch_size,
            augment=self.config.recipe.augment,
            device=self.runtime.device,
            seed=self.config.seed,
        )

    @cached_property
    def evaluations(self) -> dict[str, EvalBatches]:
        """The images that networks are judged by: test, and validation if some are held out."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        return {
            name: eval_batches(
                self.dataset,
                images,
                batch_size=self.config.recipe.eval_batch_size,
                device=self.runtime.device,
                workers=self.config.dataset.workers,
            )
            for name, images in splits.items()
            if images is not None
        }

    @cached_property
    def model_options(self) -> dict[str, Any]:
        """What ``build_model`` is told about the network, beside its sizes."""
        model = self.config.model
        return {**asked_options(model.name, model.options), **model.args}

    def prepare(self, model: nn.Module, hooks: TrainingHooks) -> nn.Module:
        """Make a freshly built network, in place, ready for a training with these hooks."""
        if self.config.sync_batchnorm:
            self.processes.share_norms(model, self.runtime.device)
        hooks.prepare(model)
        return model

    def build(self) -> nn.Module:
        """Build the unpruned network with the initialisation of ``large``."""
        model, seed = self.config.model, derive_seed(self.config.seed, "large-init")
        with seeded(seed):
            network = build_model(
                model.name,
                num_classes=self.info.num_classes,
                in_channels=self.info.channels,
                **self.model_options,
            )
        init = model.init or family_initialiser(network)
        if init is not None:
            try:
                with seeded(seed):
                    INITIALISERS[init](network)
            except ValueError as error:
                raise UserError(f"model.init={init}: {error}; give it one, or leave model.init out") from None
        return network

    def build_scratch(self, architecture: Architecture) -> nn.Module:
        """Build a pruned network with every weight drawn anew, from a stream of its own."""
        network = reshape(self.build(), architecture)
        with seeded(derive_seed(self.config.seed, "scratch-init")):
            INITIALISERS[self.init or "reset_parameters"](network)
            draw_masked(network, architecture.masks)
        return network

    @cached_property
    def sparse_hooks(self) -> TrainingHooks:
        """The pruner's part in the stage ``sparse``."""
        return self.pruner.sparse(self.target)

    def plan(self) -> dict[str, Any]:
        """Return the content of ``plan.json``: what will be trained, for how long, at what cost."""
        known = self.target.known
        pruned = self.target.cost if known else None
        large = phase_training(self.config.recipe)

        def base(trained: bool) -> dict[str, Any]:
            return {
                **asdict(self.cost),
                "epochs": large.epochs,
                "milestones": list(large.milestones),
                "train_flops": self._planned_flops(self.cost, large) if trained else 0,
                "trained": trained,
            }

        return {
            "large": base(self.reads_large and self.checkpoint is None),
            **({"sparse": base(self.prunes)} if self.pruner.trains_sparse else {}),
            "pruned": {
                "params": pruned.params if pruned else None,
                "macs": pruned.macs if pruned else None,
                "known": known,
                "layers": [asdict(layer) for layer in self.target.report().layers] if known else None,
            },
            "arms": self.plan_arms(pruned),
            "budget": self.budget(pruned.macs).summary() if pruned else {"rule": self.config.budget.name},
        }

    def plan_arms(self, pruned: Cost | None) -> dict[str, dict[str, Any]]:
        """Return what every arm will train; None for what follows from a pruned network that is not known yet."""
        budget = self.budget(pruned.macs if pruned else self.cost.macs)
        arms = {}
        for name in self.config.arms:
            arm = ARMS[name]
            training = budget.training(arm.length) if pruned or arm.length != "scratch_b" else None
            cost = self.cost if arm.network == "large" else pruned
            arms[name] = {
                "epochs": training.epochs if training else None,
                "milestones": list(training.milestones) if training else None,
                "train_flops": self._planned_flops(cost, training) if cost and training else None,
            }
        return arms

    @cached_property
    def network_key(self) -> dict[str, Any]:
        """What decides the unpruned network; a user's own code counts by its module file."""
        name = self.config.model.name
        own = ":" in name
        return {
            "name": name,
            "options": self.model_options,
            "init": self.init,
            "num_classes": self.info.num_classes,
            "in_channels": self.info.channels,
            "image_size": self.info.image_size,
            "source": source_digest(model_factory(name)) if own else None,
        }

    @cached_property
    def described_network(self) -> dict[str, Any]:
        """What a stage says about its network, for those who take it along."""
        normalization = {"mean": list(self.dataset.mean), "std": list(self.dataset.std)}
        return {"network": self.network_key, "images": normalization}

    @cached_property
    def pruner_source(self) -> str | None:
        """A digest of the module of a user's own pruner."""
        return None if self.config.pruner.name in PRUNERS else source_digest(type(self.pruner))

    @cached_property
    def pruner_key(self) -> dict[str, Any]:
        """What decides what goes, given the network's weights; the images only for pruners that look at them."""
        images = {**self.data_key, "batch_size": self.config.recipe.batch_size} if self.pruner.needs_data else None
        return {
            **self.config.pruner.model_dump(mode="json"),
            "source": self.pruner_source,
            "seed": self.config.seed,
            "images": images,
        }

    @cached_property
    def data_key(self) -> dict[str, Any]:
        """What decides the batches: the images, and how they are augmented."""
        dataset = self.config.dataset
        augment = {"pad": dataset.pad, "flip": dataset.flip} if self.config.recipe.augment else None
        return {"fingerprint": self.dataset.fingerprint, "augment": augment}

    @cached_property
    def common(self) -> dict[str, str]:
        """What processes that train together must not differ in, as an error would name it."""
        return {
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "the dataset's fingerprint": self.dataset.fingerprint,
            "the network's source": str(self.network_key["source"]),
            "the pruner's source": str(self.pruner_source),
        }

    def describe(self, experiment: str | None) -> dict[str, Any]:
        """Return what the summary says about the study as a whole."""
        config = self.config
        return {
            "experiment": experiment,
            "dataset": config.dataset.name,
            "train_images": self.info.train_images,
            "test_images": self.info.test_images,
            "model": config.model.name,
            "pruner": config.pruner.name,
            "target": {config.pruner.target: getattr(config.pruner, config.pruner.target)},
            "recipe": config.recipe.name,
            "budget": config.budget.name,
            "seed": config.seed,
            "device": self.device_name,
            "precision": self.runtime.precision,
            "arms": list(config.arms),
            "settings": self._settings(),
            "versions": _versions(),
            "commit": _commit(),
            "warnings": self._warnings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Return what results depend on beside the seed, in full: runs that differ in it are different studies."""
        config = self.config
        dataset = config.dataset.model_dump(mode="json", exclude={"root", "workers"})
        return {
            "dataset": {**dataset, "fingerprint": self.dataset.fingerprint},
            "model": self.network_key,
            "pruner": {**config.pruner.model_dump(mode="json"), "source": self.pruner_source},
            "recipe": config.recipe.model_dump(mode="json", exclude={"eval_batch_size"}),
            "budget": config.budget.model_dump(mode="json"),
            "large": {"checkpoint": self.checkpoint.digest if self.checkpoint else None},
            "sync_batchnorm": config.sync_batchnorm,
        }

    def _warnings(self) -> list[str]:
        if self.init is None and any(ARMS[name].weights == "fresh" for name in self.config.arms):
            return [
                f"{self.config.model.name} belongs to no known family: scratch arms draw weights with "
                "reset_parameters; name an initialiser with model.init if that is not how it is trained"
            ]
        return []

    def _check_init(self, model: nn.Module) -> str | None:
        """Return the initialiser of scratch arms: as configured, the family's, or None where there is neither."""
        init = self.config.model.init or family_initialiser(model)
        if init is None and any(ARMS[arm].weights == "fresh" for arm in self.config.arms):
            try:
                INITIALISERS["reset_parameters"](on_meta(model))
            except ValueError as error:
                raise UserError(
                    f"model.name={self.config.model.name}: scratch arms cannot draw its weights anew: {error}; "
                    f"give that module a reset_parameters(), or name an initialiser with model.init"
                ) from None
        return init

    def _check_output(self, model: nn.Module) -> None:
        where = f"model.name={self.config.model.name}"
        size = " x ".join(map(str, self.image_shape))
        try:
            with torch.no_grad():
                output = model.eval()(torch.zeros(1, *self.image_shape))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{where}: fails on images of {size} (dataset.channels, dataset.image_size): {reason}"
            ) from error
        if not (isinstance(output, torch.Tensor) and output.shape == (1, self.info.num_classes)):
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(f"{where}: must give logits of 1 x {self.info.num_classes} for one image; gave {shape}")

    def _reference_macs(self) -> int:
        name = self.config.budget.reference_model
        if name is None:
            return self.cost.macs
        try:
            with torch.device("meta"):
                reference = build_model(name, num_classes=self.info.num_classes, in_channels=self.info.channels)
        except UserError as error:
            raise UserError(str(error).replace("model.name", "budget.reference_model", 1)) from error
        return count_cost(reference, self.image_shape).macs

    def _planned_flops(self, cost: Cost, training: Training) -> int:
        return cost.train_flops(training.epochs * self.info.train_images)


def _versions() -> dict[str, str]:
    names = ("rethink-prune", "torch", "torchvision", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None for an installed copy."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
