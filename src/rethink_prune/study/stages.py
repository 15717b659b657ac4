"""Runs one stage through the store: takes its result if it is there, and otherwise holds its lock and does its work.

The runner alone knows locks, heartbeats, checkpoints and progress. What a stage does is a plain function (`work`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rethink_prune.errors import Interrupted
from rethink_prune.files import DETECTIONS_FILE, write_atomically
from rethink_prune.store.metrics import read_metrics, steady_pace, write_metrics
from rethink_prune.store.stage import MODEL_FILE, SAMPLE_FILE, Done, Failed, Stage, start_of, total_flops
from rethink_prune.store.weights import save_weights
from rethink_prune.study.arms import file_name, known_arm
from rethink_prune.study.keys import stage_name
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.prepare import PreparedStudy
from rethink_prune.study.product import StageAccess
from rethink_prune.study.work import do_stage
from rethink_prune.text import duration
from rethink_prune.tracking.sender import Trackers
from rethink_prune.tracking.tensorboard import ArmEvents
from rethink_prune.tracking.trackers import State, tracked_run
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Row
from rethink_prune.training.runtime import describe_device, peak_memory, reset_peak_memory
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.training.train import Diverged
from rethink_prune.turns import number_at_once

log = logging.getLogger(__name__)


class Runner:
    """Runs the stages of a study, one after the other.

    Parameters
    ----------
    study : PreparedStudy
    run_dir : Path
        Gets the TensorBoard files.
    interrupts : Interrupts
        Tells when to stop.
    stages : sequence of StageSpec
        All of the study's, as far as they are known.
    trackers : Trackers, optional
        Get every training, beside TensorBoard.
    """

    def __init__(
        self,
        study: PreparedStudy,
        run_dir: Path,
        interrupts: Interrupts,
        stages: Sequence[StageSpec],
        trackers: Trackers | None = None,
    ) -> None:
        self._study = study
        self._run_dir = run_dir
        self._interrupts = interrupts
        self._trackers = trackers
        self._flops_left: dict[str, int | None] = {}
        self._timed: set[str] = set()
        # What failed of that which arms start from.
        self._failed: str | None = None
        self.replan(stages)

    def replan(self, stages: Sequence[StageSpec]) -> None:
        """Take stages as they are planned by now, to say how much time is left."""
        for spec in stages:
            # A training that has two names takes its time once.
            self._flops_left |= {**dict.fromkeys(spec.also, 0), spec.title: spec.train_flops}

    def run(self, spec: StageSpec, parents: tuple[Done, ...] = ()) -> Done | Failed:
        """Return a stage from the store, or do its work.

        Parameters
        ----------
        spec : StageSpec
        parents : tuple of Done
            The stages it needs, as ``spec.needs`` names them.

        Raises
        ------
        Interrupted
            After a signal; the state is saved.
        UserError
            If an earlier attempt needed other weights than the parents have now.
        """
        if self._interrupts.requested is not None:
            self._interrupts.stop(f"before {spec.title}")
        if spec.key is None:
            return Failed(self._what_is_missing(spec, parents))
        stage = self._study.store.stage(stage_name(spec.kind, spec.key))
        started, done_before = start_of(parents), total_flops(parents)
        with self._curves(spec, stage, done_before) as curves:
            result: dict[str, Any] | Failed | None = stage.result(started)
            if isinstance(result, dict):
                log.info("%s: %s, from %s", spec.title, _reached(result), stage.name)
            else:
                with stage.hold():
                    # Another process may have finished it while this one waited for the lock.
                    result = stage.result(started) or self._do(spec, stage, parents, curves)
            self._flops_left[spec.title] = 0
            failed = isinstance(result, Failed)
            if curves is not None:
                # A stage from the store has its curves in every run that uses it.
                curves.write(read_metrics(stage.folder), "failed" if failed else "finished")
            if isinstance(result, Failed):
                if known_arm(spec.title) is None:
                    self._failed = spec.title
                return result
            if curves is not None and (stage.folder / DETECTIONS_FILE).is_file():
                curves.events.write_picture(stage.folder / DETECTIONS_FILE)
        return Done(stage, result, parents)

    def _do(
        self, spec: StageSpec, stage: Stage, parents: tuple[Done, ...], curves: "_Curves | None"
    ) -> dict[str, Any] | Failed:
        """Do the work of a stage that is held, and keep what it makes."""
        # What `config.yaml` says, also for those who take the network along.
        network, dataset = self._study.parts.training["network"], self._study.inputs.dataset
        images = {"mean": list(dataset.mean), "std": list(dataset.std)}
        config = {"network": network, "images": images, "key": dict(spec.key or {}), "title": spec.title}
        config["seed"] = self._study.config.seed
        if spec.kind == "detect":
            from rethink_prune.study.detect import detector_spec  # needs torchvision, which is slow to import

            config["detector"] = detector_spec(self._study).plain()
        if spec.optimizer is not None:
            config["computed"] = self._how_computed(spec.optimizer, is_detector=spec.kind == "detect")
        stage.begin(config, start_of(parents))

        def on_epoch(rows: list[Row]) -> None:
            write_metrics(stage.folder, rows)
            if curves is not None:
                curves.write(rows, "running")
            self._log_time_left(spec, rows)

        checkpoints = Checkpoints(stage.folder, stage.check_owner)
        device = self._study.runtime.device
        reset_peak_memory(device)
        try:
            product = do_stage(self._study, self._interrupts, spec, parents, StageAccess(checkpoints, on_epoch))
            save_weights(stage.model_file, product.weights)
            save_weights(stage.folder / SAMPLE_FILE, {"logits": product.sample})
            if product.picture is not None:
                from torchvision.io import encode_png  # slow to import

                write_atomically(stage.folder / DETECTIONS_FILE, encode_png(product.picture).numpy().tobytes())
            product.architecture.save(stage.folder)
        except Diverged as failure:
            stage.fail(str(failure), epoch=failure.epoch)
            log.error("%s failed: %s", spec.title, failure)
            return Failed(str(failure), failure.epoch)
        except Interrupted:
            stage.stop()
            raise
        result = {**product.result, "peak_memory_bytes": peak_memory(device), **_shared()}
        stage.finish(result, files=(MODEL_FILE, SAMPLE_FILE, "architecture.json"))
        # Only now: a kill before this line goes on from the last checkpoint.
        checkpoints.clear()
        log.info("%s: %s in %.1f s", spec.title, _reached(result), result["seconds"])
        return result

    def _curves(self, spec: StageSpec, stage: Stage, done_before: int | None) -> Any:
        """Return where a training's curves go, as a context; None where nothing is trained."""
        if spec.optimizer is None or spec.cost is None:
            return nullcontext()
        folder = self._run_dir / "tensorboard" / file_name(spec.title)
        per_image = self._study.budget.image_flops(spec.cost, taught=spec.teacher is not None)
        events = ArmEvents(folder, flops_before=done_before, flops_per_image=per_image)
        if self._trackers is None:
            return closing(_Curves(events))
        run = tracked_run(
            self._trackers.study,
            spec.title,
            stage.name,
            **asdict(spec.cost),
            epochs=spec.optimizer.epochs,
            flops_before=done_before,
            flops_per_image=per_image,
        )
        return closing(_Curves(events, partial(self._trackers.send, run)))

    def _log_time_left(self, spec: StageSpec, rows: list[Row]) -> None:
        """Say how long the rest of the study will take, once in each stage, when it has found its pace."""
        if spec.cost is None or spec.train_flops is None:
            return
        per_image = self._study.budget.image_flops(spec.cost, taught=spec.teacher is not None)
        self._flops_left[spec.title] = spec.train_flops - per_image * sum(int(row["images"]) for row in rows)
        pace = steady_pace(rows)
        if pace is None or spec.title in self._timed:
            return
        self._timed.add(spec.title)
        per_epoch = per_image * int(rows[-1]["images"])
        left = self._flops_left.values()
        # The others that train at once are as fast as this one.
        seconds = pace / per_epoch * sum(flops or 0 for flops in left) / number_at_once()
        rest = f"about {duration(seconds)} more" + (", and what follows pruning" if None in left else "")
        log.info("%s: an epoch takes %.1f s; the study will take %s", spec.title, pace, rest)

    def _how_computed(self, optimizer: OptimizerSpec, *, is_detector: bool) -> dict[str, Any]:
        """Return what a training does for speed; nothing of it is part of a key."""
        runtime, batches = self._study.runtime, self._study.inputs.train_batches
        speed = runtime.choose(0 if is_detector else optimizer.epochs * batches.steps_per_epoch)
        return {"device": describe_device(runtime.device), "precision": runtime.precision, **asdict(speed), **_shared()}

    def _what_is_missing(self, spec: StageSpec, parents: Sequence[Done]) -> str:
        """Return why a stage cannot run: a training that failed before it."""
        failed = self._failed or "large"
        if spec.optimizer is None or spec.architecture is None:
            return f"{failed} failed, so it is not known what is pruned"
        is_pruned = any(parent.stage.name.startswith("prune-") for parent in parents)
        if spec.teacher is not None and (spec.parent is None or is_pruned):
            return f"{spec.teacher} failed, so there is no network to learn from"
        return f"{failed} failed, so there is no pruned network to start from"


class _Curves:
    """Where the rows of one training go: to its events, and to the trackers."""

    def __init__(
        self, events: ArmEvents, send: Callable[[Sequence[Row], State], None] = lambda rows, state: None
    ) -> None:
        self.events = events
        self._send = send

    def write(self, rows: Sequence[Row], state: State) -> None:
        self.events.write(rows)
        self._send(rows, state)

    def close(self) -> None:
        self.events.close()


def _reached(result: Mapping[str, Any]) -> str:
    return f"{result['map']:.2f} mAP" if "map" in result else f"{result['top1']:.2f} % top-1"


def _shared() -> dict[str, int]:
    """Return how many trainings shared the device, whose time and memory are those of all; nothing for one alone."""
    number = number_at_once()
    return {"together": number} if number > 1 else {}
