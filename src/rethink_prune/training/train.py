"""The one training loop, for every arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rethink_prune.data.batches import EvalBatches, TrainBatches
from rethink_prune.data.shard import Shard
from rethink_prune.seeds import derive_seed
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.precision import autocast
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer, build_scheduler
from rethink_prune.training.step import build_step

Row = dict[str, float]


class Hooks(Protocol):
    """What takes part in a training; :class:`rethink_prune.training.hooks.TrainingHooks` does nothing."""

    @property
    def replayable(self) -> bool:
        """Whether every step launches the same work and waits for nothing, so that it can be recorded."""

    def optimized(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters that the optimiser updates."""

    def before_step(self, model: nn.Module, lr: float) -> None:
        """Act between the backward pass and the optimiser's step."""

    def after_step(self, model: nn.Module, lr: float) -> None:
        """Act after the optimiser's step, before the gradients are cleared."""

    def after_epoch(self, model: nn.Module) -> None:
        """Act after an epoch's last step, before the network is evaluated."""


class Diverged(Exception):
    """A loss is NaN or infinite."""

    def __init__(self, name: str, loss: float, epoch: int, lr: float) -> None:
        super().__init__(f"the {name} loss became {loss} in epoch {epoch} at learning rate {lr:g}")
        self.epoch = epoch
        self.lr = lr


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy `loss`, and accuracies in percent; `top5` only where there are more than five classes."""

    loss: float
    top1: float
    top5: float | None = None


@dataclass
class Progress:
    """Where a training stands: `step` batches into `epoch`; what `checkpoint` holds beside the network's state."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))


@dataclass(frozen=True)
class Runtime:
    """How the work is done on this machine; changes results within float tolerance only.

    Attributes
    ----------
    device : torch.device
    precision : {"fp32", "bf16"}
    accelerate : {"auto", "compile", "off"}
        Unless off: channels-last memory format, and on CUDA a fused optimiser and recorded steps
        (:mod:`rethink_prune.training.step`); with ``compile``, ``torch.compile`` as well.
    checkpoint_seconds : float
        At least this long between two checkpoints.
    show_progress : bool
        Draw a progress bar.
    """

    device: torch.device
    precision: str
    accelerate: str = "auto"
    checkpoint_seconds: float = 60.0
    show_progress: bool = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, in the memory format its kernels like best."""
        memory_format = torch.contiguous_format if self.accelerate == "off" else torch.channels_last
        return model.to(self.device).to(memory_format=memory_format)


def train(
    model: nn.Module,
    batches: TrainBatches,
    evaluations: Mapping[str, EvalBatches],
    spec: OptimizerSpec,
    *,
    runtime: Runtime,
    hooks: Hooks,
    seed: int,
    checkpoints: Checkpoints | None,
    interrupts: Interrupts,
    processes: Processes = ALONE,
    title: str = "",
    on_epoch: Callable[[list[Row]], None] = lambda rows: None,
) -> Progress:
    """Train `model` in place, going on from the newest checkpoint if there is one.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits N x classes.
    batches : TrainBatches
        The training images.
    evaluations : mapping of str to EvalBatches
        Sets to evaluate after every epoch, e.g. ``{"test": ...}``.
    spec : OptimizerSpec
        Optimiser, schedule and number of epochs.
    runtime : Runtime
        Device, precision and the like.
    hooks : Hooks
        A pruner's part in the training, or what holds masked weights.
    seed : int
        Seeds what the network itself draws (dropout), per step.
    checkpoints : Checkpoints or None
        Where the state is kept; a checkpoint is written when one is due and when a signal arrives. None for all but the
        first process.
    interrupts : Interrupts
        Tells when to stop.
    processes : Processes
        Those that train together, all of them with the same arguments; they share every batch.
    title : str
        Shown beside the progress bar.
    on_epoch : callable
        Gets the rows so far after every epoch, and at the start of a resumed training.

    Returns
    -------
    Progress
        With one row per epoch: ``epoch`` (from 1), ``lr``, ``images`` (in this epoch), ``train_loss``,
        ``train_top1``, ``<set>_loss``, ``<set>_top1`` and, with more than five classes, ``<set>_top5`` per evaluated
        set, ``processes`` (that trained together), ``seconds`` (so far).

    Raises
    ------
    Diverged
        If the training loss of an epoch, or a loss after it, is not finite.
    Interrupted
        After a signal; the state is saved.
    """
    model = runtime.place(model)
    fused = runtime.accelerate != "off" and runtime.device.type == "cuda"
    optimizer = build_optimizer(hooks.optimized(model), spec, fused=fused)
    scheduler = build_scheduler(optimizer, spec)
    progress = Progress()
    state = processes.broadcast(checkpoints.latest() if checkpoints is not None else None)
    if state is not None:
        progress = _restore(state, model, optimizer, scheduler)
        if not processes.is_first:
            progress.totals.zero_()  # they are those of all processes
        if progress.rows:
            on_epoch(progress.rows)
    shard, parts = processes.shard, batches.part(processes.shard)
    update = build_step(
        model,
        optimizer,
        hooks,
        forward=processes.wrap(model, runtime.device, static=runtime.accelerate != "compile"),
        device=runtime.device,
        precision=runtime.precision,
        accelerate=runtime.accelerate,
        label_smoothing=spec.label_smoothing,
    )
    clock = _Clock(progress.seconds)
    bar = tqdm(
        total=spec.epochs * batches.images_per_epoch,
        initial=batches.images_per_epoch * (progress.epoch + progress.step / batches.steps_per_epoch),
        desc=title,
        unit="img",
        unit_scale=True,
        leave=False,
        disable=not runtime.show_progress,
    )

    def save() -> None:
        progress.seconds = clock.seconds()
        totals = processes.sum(progress.totals)
        if checkpoints is not None:
            state = _state(replace(progress, totals=totals), model, optimizer, scheduler)
            checkpoints.save(state, epoch=progress.epoch, step=progress.step)
        clock.saved()

    def pause() -> None:
        """Save if it is time, and stop if a signal came to any process."""
        signum, due = processes.most(interrupts.requested or 0, int(clock.checkpoint_due(runtime.checkpoint_seconds)))
        if signum or due:
            save()
        if signum:
            interrupts.requested = signum
            interrupts.stop(f"in {title}, epoch {progress.epoch + 1} of {spec.epochs}")

    quiet = logging_redirect_tqdm() if runtime.show_progress else nullcontext()
    with bar, interrupts.deferred(), processes.explained(), quiet:
        while progress.epoch < spec.epochs:
            model.train()
            progress.totals = progress.totals.to(runtime.device)
            lr = optimizer.param_groups[0]["lr"]
            for images, labels in parts.epoch(progress.epoch, progress.step):
                size = batches.size(progress.step)
                _seed_noise(_noise_seed(seed, progress, shard), runtime.device)
                loss, logits = update(images, labels, shard.weight(len(labels), size))
                progress.totals += _loss_and_correct(loss * len(labels), logits, labels) / shard.copies(size)
                progress.step += 1
                bar.update(size)
                if progress.step < batches.steps_per_epoch and progress.step % processes.steps_together == 0:
                    pause()
            hooks.after_epoch(model)
            processes.share_state(model)
            loss_sum, correct = processes.sum(progress.totals).tolist()
            images_seen = batches.images_per_epoch
            if not math.isfinite(loss_sum):
                raise Diverged("training", loss_sum / images_seen, progress.epoch + 1, lr)
            row: Row = {
                "epoch": progress.epoch + 1,
                "lr": lr,
                "images": images_seen,
                "train_loss": loss_sum / images_seen,
                "train_top1": 100.0 * correct / images_seen,
            }
            for name, batches_of_set in evaluations.items():
                result = evaluate(model, batches_of_set, runtime=runtime, processes=processes)
                if not math.isfinite(result.loss):
                    raise Diverged(name, result.loss, progress.epoch + 1, lr)
                row[f"{name}_loss"] = result.loss
                row[f"{name}_top1"] = result.top1
                if result.top5 is not None:
                    row[f"{name}_top5"] = result.top5
            row["processes"] = processes.world
            row["seconds"] = clock.seconds()
            scheduler.step()
            progress.rows.append(row)
            progress.epoch += 1
            progress.step = 0
            progress.totals = torch.zeros_like(progress.totals)
            on_epoch(progress.rows)
            bar.set_postfix_str(f"epoch {progress.epoch}/{spec.epochs}")
            if progress.epoch < spec.epochs:
                pause()
    progress.seconds = clock.seconds()
    return progress


@torch.no_grad()
def evaluate(model: nn.Module, batches: EvalBatches, *, runtime: Runtime, processes: Processes = ALONE) -> Evaluation:
    """Return loss, top-1 and top-5 over every image of `batches`, each counted once, by one of the processes."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    classes = 0
    for images, labels in batches.part(processes.shard):
        with autocast(runtime.device, runtime.precision):
            logits = model(images)
        classes = logits.shape[1]
        totals[:2] += _loss_and_correct(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        totals[2] += _within_top5(logits, labels)
    loss, correct, within = processes.sum(totals).tolist()
    (classes,) = processes.most(classes)  # a process may have no image
    top5 = 100.0 * within / len(batches) if classes > 5 else None
    return Evaluation(loss / len(batches), 100.0 * correct / len(batches), top5)


def _noise_seed(seed: int, progress: Progress, shard: Shard) -> int:
    # Every process has other images, and draws for itself; one alone draws what the first of several does.
    others = (shard.rank,) if shard.rank else ()
    return derive_seed(seed, "noise", progress.epoch, progress.step, *others)


def _seed_noise(seed: int, device: torch.device) -> None:
    # Dropout and the like draw per step, so a resumed run needs no generator state.
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _loss_and_correct(loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Stays on the device: reading a number per step would make the host wait for it.
    return torch.stack([loss_sum.double(), (logits.argmax(1) == labels).sum().double()])


def _within_top5(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()


def _state(progress: Progress, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "seconds": progress.seconds,
        "rows": progress.rows,
        "totals": progress.totals,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def _restore(state: dict[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Progress:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return Progress(state["epoch"], state["step"], state["seconds"], state["rows"], state["totals"])


class _Clock:
    """Training seconds of a stage, however often it was stopped, and when the next checkpoint is due."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before
        self._last_save = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def saved(self) -> None:
        self._last_save = time.monotonic()

    def checkpoint_due(self, interval: float) -> bool:
        return time.monotonic() - self._last_save >= interval
