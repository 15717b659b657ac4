"""The one training loop, for every arm and every task."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rethink_prune.data.batches import Batches
from rethink_prune.seeds import derive_seed, seed_generators
from rethink_prune.training.checkpoint import Checkpoints, Parts, TrainingSaver
from rethink_prune.training.distillation import Teacher
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.hooks import TrainingFailed, TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress, Row, progress_bar
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer, build_scheduler
from rethink_prune.training.task import CLASSIFICATION, Task
from rethink_prune.turns import pass_turn


class Diverged(Exception):
    """A training broke down in an epoch: a loss is NaN or infinite, or its hooks say why."""

    def __init__(self, reason: str, epoch: int) -> None:
        super().__init__(reason)
        self.epoch = epoch


def train(
    model: nn.Module,
    batches: Batches,
    evaluations: Mapping[str, Any],
    spec: OptimizerSpec,
    *,
    runtime: Runtime,
    hooks: TrainingHooks,
    seed: int,
    checkpoints: Checkpoints | None,
    interrupts: Interrupts,
    processes: Processes = ALONE,
    teacher: Teacher | None = None,
    until: int | None = None,
    task: Task = CLASSIFICATION,
    title: str = "",
    on_epoch: Callable[[list[Row]], None] = lambda rows: None,
) -> Progress:
    """Train `model` in place, going on from the newest checkpoint if there is one.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits N x classes.
    batches : Batches
        What `task` trains on.
    evaluations : mapping
        Sets on which it judges the network after every epoch, e.g. ``{"test": ...}``.
    hooks : TrainingHooks
        A pruner's part in the training, or what holds masked weights.
    seed : int
        Seeds what the network itself draws (dropout), per step.
    checkpoints : Checkpoints or None
        A checkpoint is written when one is due and when a signal arrives. None for all but the first process.
    processes : Processes
        Those that train together, all of them with the same arguments; they share every batch.
    teacher : Teacher, optional
        What `model` learns from beside the labels; ``train_loss`` is then the loss of both.
    until : int, optional
        Stop after so many epochs, where a training of ``spec.epochs`` passes; by default at its end.
    task : Task
        What a step does, and how the network is judged.
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
        If the training loss of an epoch, or a loss after it, is not finite, or if the hooks say so.
    Interrupted
        After a signal; the state is saved.

    Examples
    --------
    >>> from rethink_prune.data import ImageArray
    >>> from rethink_prune.data.device_images import DeviceImages
    >>> from rethink_prune.data.batches import TrainBatches
    >>> from rethink_prune.data.normalization import Normalization
    >>> cpu, images = torch.device("cpu"), torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    >>> normalize = Normalization((0.5,) * 3, (0.25,) * 3, image_size=4, device=cpu)
    >>> array = ImageArray(images, torch.arange(8) % 2)
    >>> batches = TrainBatches(DeviceImages(array, normalize, pad=1, flip=True), batch_size=4)
    >>> progress = train(
    ...     nn.Sequential(nn.Flatten(), nn.Linear(48, 2)),
    ...     batches,
    ...     {},
    ...     OptimizerSpec("sgd", 0.1, 0.9, False, 1e-4, "cosine", epochs=2, milestones=(), gammas=()),
    ...     runtime=Runtime(cpu, "fp32"),
    ...     hooks=TrainingHooks(),
    ...     seed=0,
    ...     checkpoints=None,
    ...     interrupts=Interrupts(),
    ... )
    >>> [row["lr"] for row in progress.rows]
    [0.1, 0.05]
    """
    epochs = until or spec.epochs
    model = runtime.place(model)
    # Built after surgery and `hooks.prepare`, both of which make new parameters.
    optimizer = build_optimizer(hooks.optimized(model), spec, fused=runtime.accelerates_cuda, model=model)
    scheduler = build_scheduler(optimizer, spec)
    parts: Parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    saver = TrainingSaver(parts, checkpoints, interrupts, processes, runtime.checkpoint_seconds)
    progress = saver.restore()
    if progress.rows:
        on_epoch(progress.rows)
    # What a resumed training does not do again counts as well, so that it computes as it did before.
    speed = runtime.choose(spec.epochs * batches.steps_per_epoch if task.fixed_shapes else 0)
    # After the state is restored, because wrapping sends the first process's weights to the others.
    forward = processes.wrap(model, runtime.device, static=not speed.compiles)
    step = task.build_step(
        model,
        optimizer,
        hooks,
        runtime=runtime,
        forward=forward,
        label_smoothing=spec.label_smoothing,
        teacher=teacher and teacher.prepare(runtime, processes),
        compiles=speed.compiles,
    )
    judge = task.build_judge(model, hooks, runtime=runtime, processes=processes)
    shard, own_batches = processes.shard, batches.part(processes.shard)
    bar = progress_bar(progress, batches, epochs=epochs, title=title, shown=runtime.show_progress)
    # A signal does not break a step: `saver.pause` looks for it where the training can stop.
    with bar as drawn, interrupts.deferred(), processes.translate_connection_errors():
        while progress.epoch < epochs:
            # Evaluation has left the network in evaluation mode.
            model.train()
            # Summed on the device: reading a loss after every step would make the host wait for it.
            progress.totals = progress.totals.to(runtime.device)
            lr = optimizer.param_groups[0]["lr"]
            for images, labels in own_batches.epoch(progress.epoch, progress.step):
                size = batches.size(progress.step)
                _seed_noise(seed, progress, shard.rank, runtime.device)
                # The parts of a batch may differ in size: weighted, their mean gradient is that of the whole batch.
                weight = shard.weight(len(labels), size)
                speed.apply()
                # Forward, loss, backward, optimizer.step() and optimizer.zero_grad(): see PlainStep in step.py.
                sums = step(runtime.take(images), labels, weight)
                progress.totals += sums / shard.copies(size)
                progress.step += 1
                drawn.update(size)
                # The end of an epoch is no place to stop: its row is not written yet.
                if progress.step < batches.steps_per_epoch and progress.step % processes.steps_together == 0:
                    saver.pause(progress, title, epochs)
                pass_turn()
            speed.apply()
            noticed = _ask_hooks(hooks, model, progress)
            # Running statistics of batch norms differ between processes; the first one's are evaluated and saved.
            processes.share_state(model)
            loss_sum, other = processes.sum(progress.totals).tolist()
            count = batches.images_per_epoch
            trained = task.trained(loss_sum, other, count)
            # Once an epoch, not once a step, for the same reason as above; all processes see the same sum.
            _check_finite("training", trained["train_loss"], progress, lr)
            row: Row = {"epoch": progress.epoch + 1, "lr": lr, "images": count, **trained}
            for name, batches_of_set in evaluations.items():
                judged = {f"{name}_{measure}": value for measure, value in judge(batches_of_set).items()}
                _check_finite(name, judged.get(f"{name}_loss", 0.0), progress, lr)
                row |= judged
            row |= {**noticed, "processes": processes.world, "seconds": saver.seconds()}
            scheduler.step()
            progress.complete_epoch(row)
            on_epoch(progress.rows)
            drawn.set_postfix_str(f"epoch {progress.epoch}/{epochs}")
            if progress.epoch < epochs:
                saver.pause(progress, title, epochs)
    progress.seconds = saver.seconds()
    return progress


def _seed_noise(seed: int, progress: Progress, rank: int, device: torch.device) -> None:
    # Dropout draws from a seed per step, so a resumed run needs no generator state. Every process has other images and
    # needs other draws; the first one draws what a process alone does.
    others = (rank,) if rank else ()
    noise = derive_seed(seed, "noise", progress.epoch, progress.step, *others)
    seed_generators(noise)
    if device.type == "cuda":
        torch.cuda.manual_seed(noise)


def _ask_hooks(hooks: TrainingHooks, model: nn.Module, progress: Progress) -> Mapping[str, float]:
    try:
        return hooks.after_epoch(model) or {}
    except TrainingFailed as failure:
        raise Diverged(f"in epoch {progress.epoch + 1}, {failure}", progress.epoch + 1) from None


def _check_finite(name: str, loss: float, progress: Progress, lr: float) -> None:
    if not math.isfinite(loss):
        epoch = progress.epoch + 1
        raise Diverged(f"the {name} loss became {loss} in epoch {epoch} at learning rate {lr:g}", epoch)
