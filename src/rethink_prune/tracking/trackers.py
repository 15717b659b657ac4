"""Trackers that show a study's trainings beside TensorBoard: Weights & Biases, Trackio, MLflow, or one's own.

A training is a run of the tracker. Its identifier is the name of its stage, so a training that goes on continues its
run. Trackers are used in processes of their own, see :mod:`sender`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock

from rethink_prune.text import dotted_items

PROJECT = "rethink-prune"
State = Literal["running", "finished", "failed", "stopped"]

# Of a study's description in its summary, what was configured.
_CONFIGURED = (
    *("experiment", "dataset", "model", "pruner", "target", "recipe", "budget", "seed", "precision"),
    *("train_images", "test_images", "settings"),
)
_PARTS = re.compile(r"^(train|validation|test)_")


@dataclass(frozen=True)
class TrackedRun:
    """One training, as a tracker gets it.

    Attributes
    ----------
    id : str
        The name of its stage.
    title : str
        Its part in the study, such as the name of an arm.
    group : str
        Names the study.
    config : mapping
        The study's configuration, and the training's title, parameters, MACs and epochs; plain values.
    flops_before, flops_per_image : float or None
        Training FLOPs of its ancestors, and of an image; None if they are not known.
    """

    id: str
    title: str
    group: str
    config: Mapping[str, Any]
    flops_before: float | None = None
    flops_per_image: float | None = None


class OpenRun(Protocol):
    """A tracker's run that is written to.

    Attributes
    ----------
    epochs : int
        How many it has already.
    """

    epochs: int

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Add the metrics of an epoch, from 1."""

    def close(self, state: State) -> None:
        """Wait until everything is written, and mark the run."""


class Tracker(Protocol):
    """What a tracker has to be: a class that is called with the folder for its files.

    Attributes
    ----------
    destination : str
        Names the place that runs go to: a run that is complete there is not opened again.
    """

    destination: str

    def __init__(self, folder: Path) -> None: ...

    def open(self, run: TrackedRun) -> OpenRun:
        """Begin a run, or go on with the one that has its identifier."""


def tracked_run(
    study: Mapping[str, Any],
    title: str,
    stage: str,
    *,
    params: int | None,
    macs: int | None,
    epochs: int | None,
    flops_before: float | None,
    flops_per_image: float | None,
) -> TrackedRun:
    """Return a training as trackers get it; `study` is the part of that name in the study's summary."""
    configured = {name: study.get(name) for name in _CONFIGURED}
    size = {"params": params, "macs": macs, "epochs": epochs}
    config = {"arm": title, "stage": stage, **size, **configured}
    return TrackedRun(stage, title, study_group(study), config, flops_before, flops_per_image)


def study_group(study: Mapping[str, Any]) -> str:
    """Return a name for a study that all its trainings have in common, and no other study has.

    Examples
    --------
    >>> study_group({"model": "resnet20", "pruner": "l1", "target": {"ratio": 0.5}, "dataset": "digits", "seed": 0})
    'resnet20 l1 ratio=0.5 digits seed 0 0441877c'
    """
    # All that results depend on: two studies may have the same words.
    decides = json.dumps([study.get(name) for name in ("settings", "seed", "precision")], sort_keys=True)
    target = ",".join(f"{name}={value}" for name, value in study["target"].items())
    words = f"{study['model']} {study['pruner']} {target} {study['dataset']}"
    return f"{words[:80]} seed {study['seed']} {hashlib.sha256(decides.encode()).hexdigest()[:8]}"


def plain_metrics(row: Mapping[str, float], flops: float | None) -> dict[str, float]:
    """Return an epoch's row of ``metrics.csv`` by the names that trackers show.

    Examples
    --------
    >>> plain_metrics({"epoch": 1, "lr": 0.1, "train_loss": 0.5, "test_top1": 90.0}, flops=2e9)
    {'epoch': 1, 'lr': 0.1, 'train/loss': 0.5, 'test/top1': 90.0, 'train_gflops': 2.0}
    """
    metrics = {_PARTS.sub(r"\1/", name): value for name, value in row.items()}
    return metrics if flops is None else {**metrics, "train_gflops": flops / 1e9}


class _RunByInit:
    """A run of W&B or Trackio; `finish` ends it."""

    def __init__(self, run: Any, epochs: int, finish: Callable[[State], object]) -> None:
        self.epochs = epochs
        self._run = run
        self._finish = finish

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(metrics), step=epoch)

    def close(self, state: State) -> None:
        self._finish(state)


def _init(module: Any, run: TrackedRun, **options: Any) -> Any:
    """Call ``init`` of W&B or of Trackio, which has the same interface."""
    words = {"group": run.group, "config": dict(run.config), "resume": "allow", **options}
    # In a context of its own: Trackio would end the run that was begun before in the same one.
    return copy_context().run(lambda: module.init(**words))


class WandbTracker:
    """Weights & Biases: online where one is logged in, otherwise offline; ``WANDB_MODE`` decides if it is set."""

    def __init__(self, folder: Path) -> None:
        import wandb

        self._wandb = wandb
        self._mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._files = Path(os.environ.get("WANDB_DIR", folder))
        self._project = os.environ.get("WANDB_PROJECT", PROJECT)
        where = self._files.absolute() if self._mode == "offline" else os.environ.get("WANDB_BASE_URL", "")
        self.destination = f"{self._mode} {where} {os.environ.get('WANDB_ENTITY', '')}/{self._project}"

    def open(self, run: TrackedRun) -> OpenRun:
        """Begin a run, or go on with it."""
        if self._mode == "offline":
            # Files of a process that was killed lack what it had not written yet: the new ones have all epochs.
            for folder in (self._files / "wandb").glob(f"offline-run-*-{run.id}"):
                shutil.rmtree(folder, ignore_errors=True)
        # Nothing is watched but what is sent.
        quiet = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True}
        begun = _init(
            self._wandb,
            run,
            project=self._project,
            id=run.id,
            name=run.title,
            job_type=run.title,
            mode=self._mode,
            dir=str(self._files),
            reinit="create_new",
            settings=quiet,
        )
        codes = {"finished": 0, "failed": 1, "stopped": 255}  # W&B shows 255 as killed
        epochs = max(0, begun.step - 1) if begun.resumed else 0
        return _RunByInit(begun, epochs, lambda state: begun.finish(exit_code=codes[state]))


class TrackioTracker:
    """Trackio: on this machine, or where ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` says."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when the package is imported
        import trackio

        self._trackio = trackio
        where = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DIR")
        self.destination = f"{next(os.environ[name] for name in where if os.environ.get(name))} {PROJECT}"

    def open(self, run: TrackedRun) -> OpenRun:
        """Begin a run, or go on with it."""
        plain = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        with _trackio_warnings_raised():
            # It knows runs by their names alone.
            begun = _init(self._trackio, run, project=PROJECT, name=run.id, **plain)

        def finish(state: State) -> None:
            with _trackio_warnings_raised():
                begun.finish()

        # The step it would give to the next metrics: one after the last that it has.
        return _RunByInit(begun, max(0, begun._next_step - 1), finish)


@contextmanager
def _trackio_warnings_raised() -> Iterator[None]:
    """Raise what Trackio warns of: it has no errors for a server that cannot be reached, or for lost metrics."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for warning in said:
        if Path(warning.filename).parent.name == "trackio" and issubclass(warning.category, UserWarning):
            raise RuntimeError(str(warning.message))


class MlflowTracker:
    """MLflow: in a database on this machine, or where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, folder: Path) -> None:
        self._database = folder.absolute() / "mlflow.db"
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._database}"
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self._client: Any = None
        self._experiment_id = ""
        self.destination = f"{self._uri} {self._experiment}"

    def open(self, run: TrackedRun) -> OpenRun:
        """Begin a run, or go on with it."""
        if self._client is None:
            self._connect()
        found = self._client.search_runs([self._experiment_id], f"tags.stage = '{run.id}'")
        if found:
            begun = found[0]
            self._client.update_run(begun.info.run_id, status="RUNNING")
        else:
            tags = {"stage": run.id, "arm": run.title, "study": run.group}
            begun = self._client.create_run(self._experiment_id, tags=tags, run_name=run.title)
        opened = _MlflowRun(self._client, begun)
        if not begun.data.params:
            opened.describe(run.config)
        return opened

    def _connect(self) -> None:
        # Imported here: it is slow to import, and a study whose trainings are all known needs nothing of it.
        from mlflow import MlflowClient

        # Several studies may begin at once, and make the same database and experiment.
        with FileLock(self._database.with_suffix(".lock")):
            if self._uri.endswith(str(self._database)) and not self._database.exists():
                # Under another name first: MLflow cannot use one that it was killed in making.
                for file in self._database.parent.glob("mlflow.db.new*"):
                    file.unlink()
                fresh = self._database.with_suffix(".db.new")
                MlflowClient(f"sqlite:///{fresh}").search_experiments(max_results=1)
                fresh.rename(self._database)
            client = MlflowClient(self._uri)
            known = client.get_experiment_by_name(self._experiment)
            self._experiment_id = known.experiment_id if known else client.create_experiment(self._experiment)
            self._client = client


class _MlflowRun:
    """A run of MLflow."""

    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self._id = run.info.run_id
        self.epochs = int(run.data.metrics.get("epoch", 0))

    def describe(self, config: Mapping[str, Any]) -> None:
        """Add what was configured; MLflow has limits for one call, for a name and for a value."""
        from mlflow.entities import Param

        chosen = [(_mlflow_name(name), str(value)) for name, value in dotted_items(config) if value is not None]
        params = [Param(name, value[:6000]) for name, value in chosen]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[start : start + 100])

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # In one call: an epoch is there as a whole, or not at all.
        values = [Metric(_mlflow_name(name), value, now, epoch) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=values)

    def close(self, state: State) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
        self._client.set_terminated(self._id, status[state])


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


KNOWN: Mapping[str, type[Tracker]] = {"wandb": WandbTracker, "trackio": TrackioTracker, "mlflow": MlflowTracker}
