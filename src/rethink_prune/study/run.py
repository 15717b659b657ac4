"""A study: one dataset, model, pruner, budget and seed, run through its arms.

Read :func:`run_study` top to bottom: large -> (sparse) -> prune -> arms -> summary. Every stage comes from the store if
its key is there, and is computed otherwise.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rethink_prune.config import Phase, StudyConfig, parse_config
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.data import Epoch
from rethink_prune.errors import Interrupted, UserError
from rethink_prune.files import write_json
from rethink_prune.pruning import find_pruner
from rethink_prune.seeds import derive_generator
from rethink_prune.store.metrics import read_metrics, write_metrics
from rethink_prune.store.stages import MODEL_FILE, Done, Failed, Stage, Started, load_stage_weights, save_weights
from rethink_prune.study.arms import ARMS
from rethink_prune.study.budget import Training, phase_training
from rethink_prune.study.keys import optimizer_key, stage_name
from rethink_prune.study.pretrained import Checkpoint
from rethink_prune.study.setup import Setup
from rethink_prune.study.summary import Summary
from rethink_prune.study.tables import plan_text
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.text import duration
from rethink_prune.tracking.tensorboard import ArmEvents
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.hooks import HeldMasks, TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.memory import peak_memory, reset_peak_memory
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.training.train import Diverged, Row, evaluate, train

log = logging.getLogger(__name__)

UNPRUNED = Architecture()
NO_HOOKS = TrainingHooks()


def check_config(tree: Mapping[str, Any]) -> StudyConfig:
    """Validate a resolved tree against the pruners and arms there are; raises `UserError`."""
    return parse_config(tree, pruner_options=lambda name: find_pruner(name).options_type, arms=tuple(ARMS))


def run_study(
    config: StudyConfig,
    run_dir: Path,
    interrupts: Interrupts,
    *,
    experiment: str | None = None,
    processes: Processes = ALONE,
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
    processes : Processes
        Those that train together; the others run `join_study`.

    Returns
    -------
    dict
        The content of ``summary.json``; of ``plan.json`` in a dry run.

    Raises
    ------
    UserError
        If something does not fit, before any training; or at the end, if an arm failed.
    """
    setup = Setup(config, processes)
    for warning in setup.target.report().warnings:
        log.warning(warning)
    plan = setup.plan()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "plan.json", plan)
    if config.dry_run:
        print(plan_text(plan))
        return plan
    # As plain values: the classes of options may be in a module that the others have not imported yet.
    plain = config.model_dump(mode="json", serialize_as_any=True)
    # The others need no weights: these come with the start of a training.
    processes.order({**plain, "large": {**plain["large"], "checkpoint": None}})
    setup.store.prepare()
    log.info("%s, %s", setup.device_name, setup.precision_note)
    study = Study(setup, run_dir, interrupts, plan)
    hparams = config.model_dump(mode="json", exclude={"arms", "store", "dry_run"}, serialize_as_any=True)
    summary = Summary(run_dir, setup.store, setup.describe(experiment), hparams)
    large = study.large() if setup.reads_large else None
    summary.add_base("large", large)
    trained = large
    if setup.pruner.trains_sparse:
        trained = study.sparse() if setup.prunes else None
        summary.add_base("sparse", trained)
    pruned = study.pruned(trained)
    summary.add_pruned(
        pruned.cost, pruned.report, setup.budget(pruned.cost.macs).summary() if pruned.cost else {}, pruned.done
    )
    for name in config.arms:
        summary.add_arm(name, study.arm(name, pruned))
    summary.finish()
    return summary.content


@dataclass(frozen=True)
class Order:
    """A training that the first process wants the others to take part in.

    Attributes
    ----------
    title : str
        Of the stage.
    sparse : bool
        Whether it is the pruner's own training.
    architecture : Architecture
        What is left of the network.
    spec : OptimizerSpec
    common : mapping
        What has to be the same on all machines.
    """

    title: str
    sparse: bool
    architecture: Architecture
    spec: OptimizerSpec
    common: Mapping[str, str]


def join_study(interrupts: Interrupts, processes: Processes) -> None:
    """Take part in every training of the study that the first process runs, if it runs one.

    Raises
    ------
    UserError
        If this machine cannot, or if it has other images than the first process's.
    """
    orders = processes.orders()
    plain: Mapping[str, Any] | None = next(orders, None)
    if plain is None:
        return
    config = check_config(plain)
    setup = Setup(config, processes)
    order: Order
    for order in orders:
        for name, value in setup.common.items():
            if value != order.common[name]:
                raise UserError(f"{name}: {value} here, {order.common[name]} in the first process; all have to agree")
        hooks = setup.sparse_hooks if order.sparse else HeldMasks(order.architecture.masks)
        # A loss that is not finite is so in all processes; the first one records it.
        with suppress(Diverged):
            train(
                setup.prepare(reshape(setup.build(), order.architecture), hooks),
                setup.train_batches,
                setup.evaluations,
                order.spec,
                runtime=setup.runtime,
                hooks=hooks,
                seed=config.seed,
                checkpoints=None,
                interrupts=interrupts,
                processes=processes,
                title=order.title,
            )


@dataclass(frozen=True)
class Pruned:
    """The pruned network.

    Attributes
    ----------
    report : mapping
        What went, per layer, and what could not go.
    architecture, cost
        None if they follow from a training that failed.
    done : Done, Failed or None
        The prune stage; why there is none; None if no arm needs one.
    """

    report: Mapping[str, Any]
    architecture: Architecture | None
    cost: Cost | None
    done: Done | Failed | None = None


class Study:
    """The stages of one study.

    Parameters
    ----------
    setup : Setup
        What is studied, and on what.
    run_dir : Path
        Gets the TensorBoard files.
    interrupts : Interrupts
        Tells when to stop.
    plan : mapping
        The content of ``plan.json``.
    """

    def __init__(self, setup: Setup, run_dir: Path, interrupts: Interrupts, plan: Mapping[str, Any]) -> None:
        self.setup = setup
        self.run_dir = run_dir
        self.interrupts = interrupts
        self._planned = {
            **{name: plan[name]["train_flops"] for name in ("large", "sparse") if name in plan},
            **{name: arm["train_flops"] for name, arm in plan["arms"].items()},
        }
        self._pace = _Pace()

    def large(self) -> Done | Failed:
        """Train the unpruned network, or take it from ``large.checkpoint``."""
        setup = self.setup
        if setup.checkpoint is not None:
            return self._import_large(setup.checkpoint)
        recipe = setup.config.recipe
        return self._train(
            "large", kind="large", build=setup.build, cost=setup.cost, phase=recipe, training=phase_training(recipe)
        )

    def sparse(self) -> Done | Failed:
        """Train the unpruned network the pruner's own way, from the same initial weights as ``large``."""
        setup = self.setup
        recipe = setup.config.recipe
        return self._train(
            "sparse",
            kind="sparse",
            build=setup.build,
            cost=setup.cost,
            phase=recipe,
            training=phase_training(recipe),
            hooks=setup.sparse_hooks,
            pruner={
                "name": setup.config.pruner.name,
                "source": setup.pruner_source,
                **setup.sparse_hooks.key,
            },
        )

    def pruned(self, trained: Done | Failed | None) -> Pruned:
        """Prune the trained network; without one, take the architecture that the options define."""
        setup = self.setup
        target = setup.target
        if not (isinstance(trained, Done) and setup.prunes):
            return Pruned(
                asdict(target.report()),
                target.architecture() if target.known else None,
                target.cost if target.known else None,
                trained if isinstance(trained, Failed) else None,
            )
        done = self._stage(
            "prune",
            "prune",
            {"parent": trained.stage.name, "pruner": setup.pruner_key},
            partial(self._prune, trained),
            started=trained.started,
            flops_before=trained.flops_total,
        )
        assert isinstance(done, Done)
        architecture = Architecture.load(done.stage.folder)
        shapes = reshape(on_meta(setup.build()), architecture)
        cost = count_cost(shapes, setup.image_shape, masks=architecture.masks)
        arms = setup.plan_arms(cost)
        self._planned |= {name: arm["train_flops"] for name, arm in arms.items()}
        if not setup.target.known:
            lengths = ", ".join(f"{name} {arm['epochs']} epochs" for name, arm in arms.items())
            log.info("pruned: %s parameters, %.4g MACs; %s", f"{cost.params:,}", cost.macs, lengths)
        return Pruned(done.result["report"], architecture, cost, done)

    def arm(self, name: str, pruned: Pruned) -> Done | Failed:
        """Run one arm."""
        arm, setup = ARMS[name], self.setup
        if pruned.architecture is None or pruned.cost is None:
            return Failed(f"{_base(setup)} failed, so it is not known what is pruned")
        recipe = setup.config.recipe
        run = partial(
            self._train,
            name,
            phase=recipe.finetune if arm.length == "finetune" else recipe,
            training=setup.budget(pruned.cost.macs).training(arm.length),
        )
        if arm.network == "large":
            return run(kind="large", build=setup.build, cost=setup.cost)
        run = partial(
            run, cost=pruned.cost, architecture=pruned.architecture, hooks=HeldMasks(pruned.architecture.masks)
        )
        if arm.weights == "fresh":
            return run(kind="scratch", build=partial(setup.build_scratch, pruned.architecture))
        if not isinstance(pruned.done, Done):
            return Failed(f"{_base(setup)} failed, so there is no pruned network to start from")
        build = partial(self._inherit, pruned.architecture, pruned.done)
        return run(kind="finetune", build=build, parent=pruned.done)

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
        stage = self.setup.store.stage(stage_name(kind, key))
        result = stage.result(started)
        if result is None:
            with stage.hold():
                result = stage.result(started)
                if result is None:
                    stage.begin({**self.setup.described_network, "key": dict(key), "title": title}, started)
                    device = self.setup.runtime.device
                    reset_peak_memory(device)
                    try:
                        result = {**work(stage), "peak_memory_bytes": peak_memory(device)}
                    except Diverged as failure:
                        stage.fail(str(failure), epoch=failure.epoch)
                        log.error("%s failed: %s", title, failure)
                        return Failed(str(failure), failure.epoch)
                    except Interrupted:
                        stage.stop()
                        raise
                    stage.finish(result, files=(MODEL_FILE, "architecture.json"))
                    Checkpoints(stage.folder).clear()
                    log.info("%s: %.2f %% top-1 in %.1f s", title, result["top1"], result["seconds"])
        else:
            log.info("%s: %.2f %% top-1, from %s", title, result["top1"], stage.name)
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
        hooks: TrainingHooks = NO_HOOKS,
        pruner: Mapping[str, Any] | None = None,
    ) -> Done | Failed:
        """Train a network as a stage, and show it in TensorBoard; `pruner` says what `hooks` add to its key."""
        setup, recipe = self.setup, self.setup.config.recipe
        spec = OptimizerSpec(
            optimizer=recipe.optimizer,
            lr=phase.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            schedule="multistep" if phase.schedule == "step" else phase.schedule,
            epochs=training.epochs,
            milestones=training.milestones,
            gammas=training.gammas,
            warmup=min(phase.warmup, training.epochs - 1),
            decay_norms=recipe.decay_norms,
            label_smoothing=recipe.label_smoothing,
        )
        key = {
            "data": setup.data_key,
            "training": {
                **optimizer_key(spec),
                "batch_size": recipe.batch_size,
                "precision": setup.runtime.precision,
                # Only where it is not the default, so that stages of earlier versions stay valid.
                **({} if setup.config.sync_batchnorm else {"sync_batchnorm": False}),
            },
            "seed": setup.config.seed,
            "network": setup.network_key,
            "architecture": _architecture_key(architecture),
            "parent": parent.stage.name if parent else None,
            "pruner": pruner,
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

            order = list(self._planned)
            self._pace.starts(title, [self._planned[name] for name in order[order.index(title) :]])
            model = setup.prepare(build(), hooks)
            setup.processes.order(Order(title, kind == "sparse", architecture, spec, setup.common))
            progress = train(
                model,
                setup.train_batches,
                setup.evaluations,
                spec,
                runtime=setup.runtime,
                hooks=hooks,
                seed=setup.config.seed,
                checkpoints=Checkpoints(stage.folder, stage.check_owner),
                interrupts=self.interrupts,
                processes=setup.processes,
                title=title,
                on_epoch=on_epoch,
            )
            hooks.finish(model)
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
        processes = checkpoint.result.get("processes", [])
        key = {
            "checkpoint": checkpoint.digest,
            "known": known,
            "network": self.setup.network_key,
            "fingerprint": self.setup.dataset.fingerprint,
            "precision": self.setup.runtime.precision,
        }

        def work(stage: Stage) -> dict[str, Any]:
            start = time.monotonic()
            save_weights(stage.model_file, checkpoint.state)
            UNPRUNED.save(stage.folder)
            model = self.setup.build()
            model.load_state_dict(checkpoint.state)
            return {
                **self._evaluated(model),
                **asdict(self.setup.cost),
                **known,
                "processes": processes,
                "seconds": time.monotonic() - start,
            }

        return self._stage("large", "large", key, work)

    def _prune(self, trained: Done, stage: Stage) -> dict[str, Any]:
        start, setup = time.monotonic(), self.setup
        model = setup.build()
        model.load_state_dict(load_stage_weights(trained.stage))
        result = setup.pruner.prune(
            model.eval(),
            setup.target,
            data=Epoch(setup.train_batches, 0),
            generator=derive_generator(setup.config.seed, "prune"),
        )
        save_weights(stage.model_file, result.model.state_dict())
        result.architecture.save(stage.folder)
        cost = count_cost(result.model, setup.image_shape, masks=result.architecture.masks)
        evaluated = self._evaluated(result.model)
        return {
            **evaluated,
            **asdict(cost),
            "report": asdict(result.report),
            "train_flops": 0,
            "epochs": 0,
            "seconds": time.monotonic() - start,
        }

    def _inherit(self, architecture: Architecture, parent: Done) -> nn.Module:
        model = reshape(self.setup.build(), architecture)
        model.load_state_dict(load_stage_weights(parent.stage))
        return model

    def _evaluated(self, model: nn.Module) -> dict[str, float | None]:
        result = evaluate(self.setup.runtime.place(model), self.setup.evaluations["test"], runtime=self.setup.runtime)
        # A pruned network's logits can overflow before it is retrained, and JSON has no infinity.
        top5 = {} if result.top5 is None else {"top5": result.top5}
        return {"top1": result.top1, **top5, "loss": result.loss if math.isfinite(result.loss) else None}


@dataclass
class _Pace:
    """Says once per stage, after its first epoch, how long the rest of the study will take."""

    planned: dict[str, list[int | None]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def starts(self, title: str, flops: list[int | None]) -> None:
        """Note the training FLOPs of this stage and those after it; None for what is not known yet."""
        self.planned[title] = flops

    def report(self, title: str, rows: list[Row], cost: Cost) -> None:
        if title in self.told:
            return
        self.told.add(title)
        done = sum(cost.train_flops(int(row["images"])) for row in rows)
        planned = self.planned[title]
        seconds = rows[-1]["seconds"] / done * (sum(flops or 0 for flops in planned) - done)
        per_epoch = rows[-1]["seconds"] / len(rows)
        rest = f"about {duration(seconds)} more" + (", and what follows pruning" if None in planned else "")
        log.info("%s: epoch %d took %.1f s; the study will take %s", title, len(rows), per_epoch, rest)


def _training_result(rows: list[Row], cost: Cost, seconds: float) -> dict[str, Any]:
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
        "train_flops": cost.train_flops(sum(int(row["images"]) for row in rows)),
        "seconds": seconds,
    }
    if "validation_top1" in last:
        selected = max(rows, key=lambda row: row["validation_top1"])
        result["top1_selected"] = selected["test_top1"]
        result["selected_epoch"] = int(selected["epoch"])
    return result


def _architecture_key(architecture: Architecture) -> dict[str, Any]:
    return {
        "modules": architecture.modules,
        "edits": architecture.edits,
        "selections": {name: indexes.tolist() for name, indexes in architecture.selections.items()},
        "removed": architecture.removed,
        "masks": {
            name: hashlib.sha256(mask.numpy().tobytes()).hexdigest() for name, mask in architecture.masks.items()
        },
    }


def _base(setup: Setup) -> str:
    return "sparse" if setup.pruner.trains_sparse else "large"
