"""A study: one dataset, model, pruner, budget and seed, run through its arms.

Read :func:`run_study` top to bottom: large -> prune -> arms -> summary. Every stage comes from the store if its key is
there, and is computed otherwise.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rethink_prune.arms import ARMS
from rethink_prune.budget import Budget, Training, phase_training
from rethink_prune.config import Phase, StudyConfig, parse_config
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.data import EvalBatches, ImageDataset, TrainBatches, describe_dataset, load_dataset
from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically, write_json
from rethink_prune.imports import source_digest
from rethink_prune.models import build_model, model_factory
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.pruning import PRUNERS, PruneReport, Target, find_pruner, run_pruner
from rethink_prune.pruning.surgery import Architecture, reshape
from rethink_prune.results.metrics import read_metrics, write_metrics
from rethink_prune.results.tables import COLUMNS, markdown, plan_rows, study_rows
from rethink_prune.results.tensorboard import ArmEvents, write_hparams
from rethink_prune.seeds import derive_generator, derive_seed, seeded
from rethink_prune.store import MODEL_FILE, Stage, Started, Store, save_weights
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.loop import Diverged, Row, Runtime, evaluate, train
from rethink_prune.training.precision import resolve_device, resolve_precision
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.weights import Checkpoint, load_stage_weights, read_checkpoint

log = logging.getLogger(__name__)

UNPRUNED = Architecture()


def check_config(tree: Mapping[str, Any]) -> StudyConfig:
    """Validate a resolved tree against the pruners and arms there are; raises `UserError`."""
    return parse_config(tree, pruner_options=lambda name: find_pruner(name).options, arms=tuple(ARMS))


def run_study(
    config: StudyConfig, run_dir: Path, interrupts: Interrupts, *, experiment: str | None = None
) -> dict[str, Any]:
    """Run a study and return its summary.

    Parameters
    ----------
    config : StudyConfig
        A validated configuration.
    run_dir : Path
        Gets ``plan.json``, ``summary.json``, ``summary.md`` and ``tensorboard/``.
    interrupts : Interrupts
        Tells when to stop.
    experiment : str, optional
        Name of the experiment file, for the summary.

    Returns
    -------
    dict
        The content of ``summary.json``; of ``plan.json`` in a dry run.

    Raises
    ------
    UserError
        If something does not fit, before any training; or at the end, if an arm failed.
    """
    study = Study(config, run_dir, interrupts)
    plan = study.plan()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "plan.json", plan)
    if config.dry_run:
        print(markdown(("arm", "epochs", "milestones", "training FLOPs"), plan_rows(plan)))
        return plan
    log.info("%s, %s; %s", study.device_name, study.precision_note, _plural(study.dataset.train, "training image"))
    summary = Summary(study, experiment)
    large = study.large() if study.reads_large else None
    summary.add_large(large)
    pruned = study.pruned(large)
    summary.add_pruned(pruned)
    for name in config.arms:
        summary.add_arm(name, study.arm(name, large, pruned))
    summary.finish()
    return summary.content


@dataclass(frozen=True)
class Done:
    """A finished stage: where it is, what it recorded, and the training FLOPs of its ancestors (None: not known)."""

    stage: Stage
    result: dict[str, Any]
    flops_before: int | None = 0

    @property
    def flops_total(self) -> int | None:
        """Training FLOPs of the stage and its ancestors."""
        own = self.result["train_flops"]
        return None if own is None or self.flops_before is None else own + self.flops_before

    @property
    def started(self) -> Started:
        """What a stage that starts from these weights records."""
        return Started(self.stage.name, self.stage.digest)


@dataclass(frozen=True)
class Failed:
    """A stage without a result, and why."""

    reason: str
    epoch: int | None = None


@dataclass(frozen=True)
class Pruned:
    """The pruned network: its architecture and cost, and the finished prune stage if there is one."""

    architecture: Architecture
    cost: Cost
    report: PruneReport
    done: Done | Failed | None = None


class Study:
    """What a configuration means on this machine; making one checks everything that can be wrong.

    Raises
    ------
    UserError
        If the parts of the configuration do not fit each other, the data or the machine.
    """

    def __init__(self, config: StudyConfig, run_dir: Path, interrupts: Interrupts) -> None:
        self.config = config
        self.run_dir = run_dir
        self.interrupts = interrupts
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        self.precision_note = f"precision {precision}" + (" (auto)" if config.precision == "auto" else "")
        self.runtime = Runtime(
            device=device,
            precision=precision,
            accelerate=config.accelerate == "auto",
            checkpoint_seconds=config.store.checkpoint_seconds,
            show_progress=sys.stderr.isatty(),
        )
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        self._describe = config.dataset.model_dump(exclude={"pad", "flip", "mean", "std"})
        self.info = describe_dataset(**self._describe)
        self.image_shape = (self.info.channels, self.info.image_size, self.info.image_size)
        self.pruner = find_pruner(config.pruner.name)
        if config.model.init not in (None, *INITIALISERS):
            raise UserError(f"model.init={config.model.init}: no such initialiser; one of {', '.join(INITIALISERS)}")
        model = self.build()
        self.init = self._check_init(model)
        self._check_output(model)
        self.target = Target(self.pruner, config.pruner, model, self.example, config.model.name)
        self.cost = self.target.full_cost
        self.checkpoint: Checkpoint | None = None
        if config.large.checkpoint is not None:
            self.checkpoint = read_checkpoint(config.large.checkpoint, model, config.model.name)
        self.budget = Budget(config.recipe, config.budget, self._reference_macs(), self.target.cost.macs)
        self.store = Store(Path(config.store.root))
        if not config.dry_run:
            self.store.prepare()
        self._pace = _Pace()

    # What the configuration says, worked out once.

    @property
    def example(self) -> torch.Tensor:
        """One black image in the network's input format."""
        return torch.zeros(1, *self.image_shape)

    @property
    def device_name(self) -> str:
        """The device, as a person would call it."""
        device = self.runtime.device
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"

    @property
    def reads_large(self) -> bool:
        """Whether anything needs the unpruned network."""
        return (
            self.config.large.baseline
            or not self.pruner.predefined
            or any(ARMS[name].weights == "inherited" for name in self.config.arms)
        )

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images."""
        options = self.config.dataset.model_dump(exclude={"pad", "flip"})
        return load_dataset(**options, cache_dir=self.store.cache, progress=self.runtime.show_progress)

    @cached_property
    def train_batches(self) -> TrainBatches:
        """The training images on the device, augmented as the recipe says."""
        augment = self.config.recipe.augment
        return TrainBatches(
            self.dataset.train,
            mean=self.dataset.mean,
            std=self.dataset.std,
            batch_size=self.config.recipe.batch_size,
            pad=self.config.dataset.pad if augment else 0,
            flip=self.config.dataset.flip and augment,
            device=self.runtime.device,
            seed=self.config.seed,
        )

    @cached_property
    def evaluations(self) -> dict[str, EvalBatches]:
        """The images that networks are judged by: test, and validation if some are held out."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        return {
            name: EvalBatches(
                split,
                mean=self.dataset.mean,
                std=self.dataset.std,
                batch_size=self.config.recipe.eval_batch_size,
                device=self.runtime.device,
            )
            for name, split in splits.items()
            if split is not None
        }

    def build(self) -> nn.Module:
        """Build the unpruned network with the initialisation of ``large``."""
        model, seed = self.config.model, derive_seed(self.config.seed, "large-init")
        with seeded(seed):
            network = build_model(
                model.name,
                num_classes=self.info.num_classes,
                in_channels=self.info.channels,
                **model.options,
            )
        init = model.init or family_initialiser(network)
        if init is not None:
            with seeded(seed):
                INITIALISERS[init](network)
        return network

    def build_scratch(self, architecture: Architecture) -> nn.Module:
        """Build a pruned network with every weight drawn anew, from a stream of its own."""
        network = reshape(self.build(), architecture)
        with seeded(derive_seed(self.config.seed, "scratch-init")):
            INITIALISERS[self.init or "reset_parameters"](network)
        return network

    def plan(self) -> dict[str, Any]:
        """Return the content of ``plan.json``: what will be trained, for how long, at what cost."""
        config, known = self.config, self.pruner.predefined
        arms = {}
        for name in config.arms:
            arm = ARMS[name]
            fixed = known or arm.length != "scratch_b"
            training = self.budget.training(arm.length) if fixed else None
            cost = self.cost if arm.network == "large" else self.target.cost if known else None
            arms[name] = {
                "epochs": training.epochs if training else None,
                "milestones": list(training.milestones) if training else None,
                "train_flops": self._planned_flops(cost, training) if cost and training else None,
            }
        large = phase_training(config.recipe)
        trained = self.reads_large and self.checkpoint is None
        return {
            "large": {
                **asdict(self.cost),
                "epochs": large.epochs,
                "milestones": list(large.milestones),
                "train_flops": self._planned_flops(self.cost, large) if trained else 0,
                "trained": trained,
            },
            "pruned": {
                "params": self.target.cost.params if known else None,
                "macs": self.target.cost.macs if known else None,
                "known": known,
                "layers": [asdict(layer) for layer in self.target.report().layers] if known else None,
            },
            "arms": arms,
            "budget": self.budget.summary() if known else {"rule": config.budget.name},
        }

    # The stages, in the order of the pipeline.

    def large(self) -> Done | Failed:
        """Train the unpruned network, or take it from ``large.checkpoint``."""
        if self.checkpoint is not None:
            return self._import_large(self.checkpoint)
        return self._train(
            "large", kind="large", build=self.build, cost=self.cost, phase=self.config.recipe,
            training=phase_training(self.config.recipe),
        )  # fmt: skip

    def pruned(self, large: Done | Failed | None) -> Pruned:
        """Prune the trained network; without one, take the architecture that the options define."""
        if isinstance(large, Done):
            done = self._stage("prune", "prune", {"parent": large.stage.name, "pruner": self._pruner_key},
                               partial(self._prune, large), started=large.started, flops_before=large.flops_total)  # fmt: skip
            assert isinstance(done, Done)
            architecture = Architecture.load(done.stage.folder)
            shapes = reshape(on_meta(self.build()), architecture)
            return Pruned(architecture, count_cost(shapes, self.image_shape), self.target.report(), done)
        return Pruned(self.target.architecture(), self.target.cost, self.target.report(), large)

    def arm(self, name: str, large: Done | Failed | None, pruned: Pruned) -> Done | Failed:
        """Run one arm."""
        arm = ARMS[name]
        training = Budget(
            self.config.recipe, self.config.budget, self.budget.macs_reference, pruned.cost.macs
        ).training(arm.length)
        phase = self.config.recipe.finetune if arm.length == "finetune" else self.config.recipe
        run = partial(self._train, name, phase=phase, training=training)
        if arm.network == "large":
            return run(kind="large", build=self.build, cost=self.cost)
        if arm.weights == "fresh":
            build = partial(self.build_scratch, pruned.architecture)
            return run(kind="scratch", build=build, cost=pruned.cost, architecture=pruned.architecture)
        if not isinstance(pruned.done, Done):
            return Failed("large failed, so there is no pruned network to start from")
        build = partial(self._inherit, pruned.architecture, pruned.done)
        return run(
            kind="finetune",
            build=build,
            cost=pruned.cost,
            architecture=pruned.architecture,
            parent=pruned.done,
        )

    # How stages are done.

    def _stage(
        self,
        title: str,
        kind: str,
        key: Mapping[str, Any],
        work: Callable[[Stage], dict[str, Any]],
        *,
        started: Started | None = None,
        flops_before: int | None = 0,
    ) -> Done | Failed:
        """Return a stage from the store, or do its work while holding its lock."""
        if self.interrupts.requested is not None:
            self.interrupts.stop(f"before {title}")
        stage = self.store.stage(kind, key)
        result = stage.result(started)
        if result is None:
            with stage.hold():
                result = stage.result(started)
                if result is None:
                    stage.begin({"network": self._network_key, "key": dict(key), "title": title}, started)
                    try:
                        result = work(stage)
                    except Diverged as failure:
                        stage.fail(str(failure), epoch=failure.epoch)
                        log.error("%s failed: %s", title, failure)
                        return Failed(str(failure), failure.epoch)
                    stage.finish(result, files=(MODEL_FILE, "architecture.json"))
                    Checkpoints(stage.folder).clear()
                    log.info("%s: %.2f %% top-1 in %.1f s", title, result["top1"], result["seconds"])
        else:
            log.info("%s: %.2f %% top-1, from %s", title, result["top1"], stage.name)
        self._pace.finished(title)
        return Done(stage, result, flops_before)

    def _train(
        self,
        title: str,
        *,
        kind: str,
        build: Callable[[], nn.Module],
        cost: Cost,
        phase: Phase,
        training: Training,
        architecture: Architecture = UNPRUNED,
        parent: Done | None = None,
    ) -> Done | Failed:
        """Train a network as a stage, and show it in TensorBoard."""
        recipe = self.config.recipe
        spec = OptimizerSpec(
            optimizer=recipe.optimizer,
            lr=phase.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            schedule=phase.schedule,
            epochs=training.epochs,
            milestones=training.milestones,
            gamma=phase.gamma,
        )
        augment = {"pad": self.config.dataset.pad, "flip": self.config.dataset.flip} if recipe.augment else None
        key = {
            "data": {"fingerprint": self.dataset.fingerprint, "augment": augment},
            "training": {
                **asdict(spec),
                "batch_size": recipe.batch_size,
                "precision": self.runtime.precision,
            },
            "seed": self.config.seed,
            "network": self._network_key,
            "architecture": _architecture_key(architecture),
            "parent": parent.stage.name if parent else None,
        }
        flops_before = parent.flops_total if parent else 0
        events = ArmEvents(
            self.run_dir / "tensorboard" / title,
            flops_before=flops_before,
            flops_per_image=cost.train_flops(1),
        )

        def work(stage: Stage) -> dict[str, Any]:
            def on_epoch(rows: list[Row]) -> None:
                write_metrics(stage.folder, rows)
                events.write(rows)
                self._pace.report(title, rows, cost)

            self._pace.starts(title, self._remaining_flops(title))
            model = build()
            progress = train(
                model,
                self.train_batches,
                self.evaluations,
                spec,
                runtime=self.runtime,
                seed=self.config.seed,
                checkpoints=Checkpoints(stage.folder, stage.check_owner),
                interrupts=self.interrupts,
                title=title,
                on_epoch=on_epoch,
            )
            save_weights(stage.model_file, model.state_dict())
            architecture.save(stage.folder)
            return _training_result(progress.rows, cost, progress.seconds)

        started = parent.started if parent else None
        done = self._stage(title, kind, key, work, started=started, flops_before=flops_before)
        if isinstance(done, Done):
            events.write(read_metrics(done.stage.folder))
        events.close()
        return done

    def _import_large(self, checkpoint: Checkpoint) -> Done | Failed:
        """Make a stage of the weights the user brought."""
        # What training the weights cost is known only if they come from a stage.
        known = {name: checkpoint.result.get(name) for name in ("epochs", "train_flops")}
        key = {
            "checkpoint": checkpoint.digest,
            "known": known,
            "network": self._network_key,
            "fingerprint": self.dataset.fingerprint,
            "precision": self.runtime.precision,
        }

        def work(stage: Stage) -> dict[str, Any]:
            start = time.monotonic()
            save_weights(stage.model_file, checkpoint.state)
            UNPRUNED.save(stage.folder)
            model = self.build()
            model.load_state_dict(checkpoint.state)
            return {
                **self._evaluated(model),
                **asdict(self.cost),
                **known,
                "seconds": time.monotonic() - start,
            }

        return self._stage("large", "large", key, work)

    def _prune(self, large: Done, stage: Stage) -> dict[str, Any]:
        start = time.monotonic()
        model = self.build()
        model.load_state_dict(load_stage_weights(large.stage))
        generator = derive_generator(self.config.seed, "prune")
        result = run_pruner(self.pruner, self.target, model, data=self.train_batches.epoch(0), generator=generator)
        save_weights(stage.model_file, result.model.state_dict())
        result.architecture.save(stage.folder)
        cost = count_cost(result.model, self.image_shape)
        evaluated = self._evaluated(result.model)
        return {
            **evaluated,
            **asdict(cost),
            "train_flops": 0,
            "epochs": 0,
            "seconds": time.monotonic() - start,
        }

    def _inherit(self, architecture: Architecture, parent: Done) -> nn.Module:
        model = reshape(self.build(), architecture)
        model.load_state_dict(load_stage_weights(parent.stage))
        return model

    def _evaluated(self, model: nn.Module) -> dict[str, float]:
        result = evaluate(self.runtime.place(model), self.evaluations["test"], runtime=self.runtime)
        return {"top1": result.top1, "loss": result.loss}

    # Checks and keys.

    @cached_property
    def _network_key(self) -> dict[str, Any]:
        """What decides the unpruned network; a user's own code counts by its module file."""
        name = self.config.model.name
        own = ":" in name
        return {
            "name": name,
            "options": self.config.model.options,
            "init": self.init,
            "num_classes": self.info.num_classes,
            "in_channels": self.info.channels,
            "image_size": self.info.image_size,
            "source": source_digest(model_factory(name)) if own else None,
        }

    @cached_property
    def _pruner_key(self) -> dict[str, Any]:
        options = self.config.pruner
        source = None if options.name in PRUNERS else source_digest(type(self.pruner))
        return {**options.model_dump(mode="json"), "source": source}

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
            output = on_meta(model).eval()(self.example.to("meta"))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{where}: fails on images of {size}: {reason}") from error
        if not (isinstance(output, torch.Tensor) and output.shape == (1, self.info.num_classes)):
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(f"{where}: must give logits of 1 x {self.info.num_classes} for one image; gave {shape}")

    def _reference_macs(self) -> int:
        name = self.config.budget.reference_model
        if name is None:
            return self.cost.macs
        reference = build_model(name, num_classes=self.info.num_classes, in_channels=self.info.channels)
        return count_cost(reference, self.image_shape).macs

    def _planned_flops(self, cost: Cost, training: Training) -> int:
        return cost.train_flops(training.epochs * self.info.train_images)

    def _remaining_flops(self, title: str) -> int:
        """Return the training FLOPs planned from this stage on."""
        plan = self.plan()
        order = ["large", *self.config.arms]
        entries = {"large": plan["large"], **plan["arms"]}
        return sum(entries[name]["train_flops"] or 0 for name in order[order.index(title) :])


@dataclass
class _Pace:
    """Says once per stage, after its first epoch, how long the rest of the study will take."""

    planned: dict[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def starts(self, title: str, remaining_flops: int) -> None:
        self.planned[title] = remaining_flops

    def report(self, title: str, rows: list[Row], cost: Cost) -> None:
        if title in self.told:
            return
        self.told.add(title)
        done = sum(cost.train_flops(int(row["images"])) for row in rows)
        seconds = rows[-1]["seconds"] / done * (self.planned[title] - done)
        log.info("%s: epoch %d took %.1f s; the study will take about %s more",
                 title, len(rows), rows[-1]["seconds"] / len(rows), _duration(seconds))  # fmt: skip

    def finished(self, title: str) -> None:
        self.told.add(title)


class Summary:
    """``summary.json`` and ``summary.md``, rewritten after every stage."""

    def __init__(self, study: Study, experiment: str | None) -> None:
        self.study = study
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        config = study.config
        self.content: dict[str, Any] = {
            "study": {
                "experiment": experiment,
                "dataset": config.dataset.name,
                "train_images": study.info.train_images,
                "test_images": study.info.test_images,
                "model": config.model.name,
                "pruner": config.pruner.name,
                "target": {config.pruner.target: getattr(config.pruner, config.pruner.target)},
                "recipe": config.recipe.name,
                "budget": config.budget.name,
                "seed": config.seed,
                "device": study.device_name,
                "precision": study.runtime.precision,
                "versions": _versions(),
                "commit": _commit(),
                "warnings": self._warnings(),
            }
        }
        self._stages: dict[str, str] = {}

    def add_large(self, large: Done | Failed | None) -> None:
        """Add the unpruned network, if it was needed."""
        if large is not None:
            self.content["large"] = self._entry("large", large)
        self._write()

    def add_pruned(self, pruned: Pruned) -> None:
        """Add the pruned network before any retraining."""
        entry: dict[str, Any] = {**asdict(pruned.cost)}
        if isinstance(pruned.done, Done):
            entry.update({name: pruned.done.result[name] for name in ("top1", "loss")})
            entry["stage"] = str(pruned.done.stage.folder)
            self._stages["prune"] = pruned.done.stage.name
        entry["layers"] = [asdict(layer) for layer in pruned.report.layers]
        entry["frozen"] = dict(pruned.report.frozen)
        self.content["pruned"] = entry
        self.content["study"]["warnings"] += pruned.report.warnings
        self.content["study"]["ledger"] = Budget(
            self.study.config.recipe,
            self.study.config.budget,
            self.study.budget.macs_reference,
            pruned.cost.macs,
        ).summary()
        self.content["arms"] = {}
        self._write()

    def add_arm(self, name: str, outcome: Done | Failed) -> None:
        """Add one arm."""
        self.content["arms"][name] = self._entry(name, outcome)
        self._write()

    def finish(self) -> None:
        """Print the table; raise if a stage failed."""
        arms = self.content["arms"]
        finals = {f"top1/{name}": entry["top1"] for name, entry in arms.items() if entry["status"] == "done"}
        write_hparams(self.study.run_dir / "tensorboard" / "hparams", self._hparams(), finals)
        print(self._table())
        entries = {name: entry for name, entry in {"large": self.content.get("large"), **arms}.items() if entry}
        failed = {name: entry["reason"] for name, entry in entries.items() if entry["status"] == "failed"}
        if failed:
            raise UserError("; ".join(f"{name} failed: {reason}" for name, reason in failed.items()))

    def _entry(self, title: str, outcome: Done | Failed) -> dict[str, Any]:
        if isinstance(outcome, Failed):
            return {"status": "failed", "reason": outcome.reason, "epoch": outcome.epoch}
        self._stages[title] = outcome.stage.name
        return {
            "status": "done",
            **outcome.result,
            "train_flops_total": outcome.flops_total,
            "stage": str(outcome.stage.folder),
        }

    def _warnings(self) -> list[str]:
        study = self.study
        if study.init is None and any(ARMS[name].weights == "fresh" for name in study.config.arms):
            return [
                f"{study.config.model.name} belongs to no known family: scratch arms draw weights with "
                "reset_parameters; name an initialiser with model.init if that is not how it is trained"
            ]
        return []

    def _hparams(self) -> dict[str, Any]:
        described = self.content["study"]
        names = ("dataset", "model", "pruner", "recipe", "budget", "seed", "precision")
        target = {f"pruner.{name}": value for name, value in described["target"].items()}
        return {**{name: described[name] for name in names}, **target}

    def _table(self) -> str:
        described = self.content["study"]
        target = ", ".join(f"{name}={value}" for name, value in described["target"].items())
        title = (
            f"{described['model']} on {described['dataset']}, {described['pruner']} {target}, "
            f"recipe {described['recipe']}, budget {described['budget']}, seed {described['seed']}"
        )
        failures = [
            f"{name} failed: {entry['reason']}"
            for name, entry in self.content.get("arms", {}).items()
            if entry["status"] == "failed"
        ]
        notes = [f"Note: {warning}." for warning in described["warnings"]]
        return "\n\n".join([title, markdown(COLUMNS, study_rows(self.content)), *failures, *notes])

    def _write(self) -> None:
        write_json(self.study.run_dir / "summary.json", self.content)
        write_atomically(self.study.run_dir / "summary.md", f"{self._table()}\n".encode())
        record = {"run_dir": str(self.study.run_dir.absolute()), "stages": self._stages}
        self.study.store.record_run(self.run_id, record)


def _training_result(rows: list[Row], cost: Cost, seconds: float) -> dict[str, Any]:
    """Return what a finished training records: the last epoch's numbers, and the best epoch's as the paper has them."""
    last = rows[-1]
    best = max(rows, key=lambda row: row["test_top1"])
    result: dict[str, Any] = {
        "top1": last["test_top1"],
        "top1_best": best["test_top1"],
        "best_epoch": int(best["epoch"]),
        "loss": last["test_loss"],
        "epochs": len(rows),
        **asdict(cost),
        "train_flops": cost.train_flops(sum(int(row["images"]) for row in rows)),
        "seconds": seconds,
    }
    if "validation_top1" in last:
        selected = max(rows, key=lambda row: row["validation_top1"])
        result["top1_selected"] = selected["test_top1"]
        result["selected_epoch"] = int(selected["epoch"])
    return result


def _architecture_key(architecture: Architecture) -> dict[str, Any]:
    selections = {name: indexes.tolist() for name, indexes in architecture.selections.items()}
    return {"modules": architecture.modules, "edits": architecture.edits, "selections": selections}


def _versions() -> dict[str, str]:
    names = ("rethink-prune", "torch", "torchvision", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None for an installed copy."""
    import subprocess

    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _plural(items: Any, noun: str) -> str:
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
