"""One step of training: plain, through ``torch.compile``, or as a recorded CUDA graph.

With ``accelerate=auto`` a step on CUDA is recorded once and then replayed (see `recording.py`), and the network of a
long training goes through ``torch.compile`` before. With ``accelerate=compile`` it always does, on any device. Where
either is not possible, the step is done plainly, and one line of the log says why.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import UserError, first_line
from rethink_prune.outputs import loss_and_correct, main_output, output_loss
from rethink_prune.training.distillation import Teacher
from rethink_prune.training.distributed import is_connection_error
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.recording import CudaRecorder, Recorded, warn_not_recorded, why_not_recorded
from rethink_prune.training.runtime import Runtime

log = logging.getLogger(__name__)

_numbers = itertools.count()


def build_step(
    model: nn.Module,
    optimizer: Optimizer,
    hooks: TrainingHooks,
    *,
    runtime: Runtime,
    forward: nn.Module | None = None,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    compiles: bool = False,
) -> Step:
    """Return the fastest step that `runtime` asks for and that can train `model`.

    Parameters
    ----------
    model : torch.nn.Module
        On the device, with its optimiser's and hooks' parameters.
    optimizer : Optimizer
        Its learning rates may change between steps.
    forward : torch.nn.Module, optional
        What to call instead of the network: several processes wrap it.
    label_smoothing : float
        Of the loss, in [0, 1).
    teacher : Teacher, optional
        Ready to teach; its forward pass is part of the step.
    compiles : bool
        Whether the network goes through ``torch.compile``.

    Examples
    --------
    >>> model = nn.Linear(2, 3)
    >>> step = build_step(
    ...     model,
    ...     torch.optim.SGD(model.parameters(), lr=0.1),
    ...     TrainingHooks(),
    ...     runtime=Runtime(torch.device("cpu"), "fp32"),
    ... )
    >>> images, labels = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    >>> first, second = (step(images, labels).tolist() for _ in range(2))  # summed loss, correct images
    >>> second[0] < first[0]
    True
    """
    # The network itself goes to the hooks, which know its parameters by their own names.
    plain = PlainStep(model, forward or model, optimizer, hooks, runtime, label_smoothing, teacher)
    step = CompiledStep(plain) if compiles else plain
    if not runtime.accelerates_cuda:
        return step
    if why_not := why_not_recorded(hooks):
        warn_not_recorded("this training", why_not)
        return step
    return record_step(step, model, optimizer, CudaRecorder(runtime.device))


class Step(Protocol):
    """Trains a network on one batch; what it returns may be overwritten by the next step."""

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Return the summed loss and how many images are classified correctly: float64, 2.

        Labels are N class numbers or, of mixed images, the shares of the classes, N x classes.
        The gradients are those of the mean loss times `weight`.
        """


@dataclass(frozen=True)
class PlainStep:
    """Forward, backward and one step of the optimiser.

    Attributes
    ----------
    model : torch.nn.Module
        What the hooks see.
    forward : callable
        The same network, perhaps wrapped for several processes, or compiled.
    teacher : Teacher, optional
        What it learns from beside the labels.
    """

    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: Optimizer
    hooks: TrainingHooks
    runtime: Runtime
    label_smoothing: float
    teacher: Teacher | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Train on one batch; raise `UserError` if ``deterministic=true`` refuses an operation."""
        with translate_refused_operations():
            # Forward alone: the backward pass takes the types that the forward pass has chosen.
            with self.runtime.autocast():
                output = self.forward(images)
            loss = self._loss(images, output, labels)
            update(self.model, loss * weight, self.optimizer, self.hooks)
            return loss_and_correct(loss.detach() * len(labels), main_output(output).detach(), labels)

    def _loss(self, images: torch.Tensor, output: object, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self.label_smoothing
        if self.teacher is None:
            return output_loss(output, labels, label_smoothing=smoothing)
        return self.teacher.loss(images, output, labels, runtime=self.runtime, label_smoothing=smoothing)


def update(model: nn.Module, loss: torch.Tensor, optimizer: Optimizer, hooks: TrainingHooks) -> None:
    """Go back through a loss and take one step of the optimiser, hooks included."""
    loss.backward()
    lr = optimizer.param_groups[0]["lr"]
    hooks.before_step(model, lr)
    optimizer.step()
    hooks.after_step(model, lr)
    # At the end, not before the next forward pass: no gradient takes memory while the network is evaluated.
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def translate_refused_operations() -> Iterator[None]:
    """Raise `UserError` where the body runs an operation that ``deterministic=true`` refuses."""
    try:
        yield
    except RuntimeError as error:
        operation, refused, _ = str(error).partition(" does not have a deterministic implementation")
        if not refused:
            raise
        raise UserError(
            f"deterministic=true: {operation} has no deterministic implementation on this device; "
            "take another network, or leave deterministic out"
        ) from error


class CompiledStep:
    """The step through ``torch.compile``, and the plain step from the first failure on.

    Batches of a shape that comes only once in a row, such as the last of an epoch, are done plainly: to compile for
    them takes longer than they do.
    """

    def __init__(self, plain: PlainStep) -> None:
        self._step = replace(plain, forward=torch.compile(_with_own_code(plain.forward), dynamic=False))
        self._plain = plain
        self._shape: torch.Size | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Train on one batch."""
        shape, self._shape = self._shape, images.shape
        if images.shape != shape:
            return self._plain(images, labels, weight)
        try:
            return self._step(images, labels, weight)
        except RuntimeError as error:
            if self._step is self._plain or is_connection_error(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            # An error that has nothing to do with compilation comes again in the plain step, and is raised there.
            self._step = self._plain
            # The failed backward pass may have left gradients, to which the plain step would add its own.
            self._plain.model.zero_grad(set_to_none=True)
            log.warning("accelerate: torch.compile failed: %s; going on without it", first_line(error))
        return self._plain(images, labels, weight)


def _with_own_code(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that calls `forward` and shares its code object with no other.

    PyTorch keeps what it has compiled with the code object. It would take code compiled for another network of the same
    class for this one, whose forward hooks differ, and give up after eight shapes.
    """

    def call(images: torch.Tensor) -> torch.Tensor:
        return forward(images)

    call.__code__ = call.__code__.replace(co_name=f"forward_{next(_numbers)}")
    return call


def record_step(step: Step, model: nn.Module, optimizer: Optimizer, recorder: CudaRecorder) -> Step:
    """Return a step that is replayed for full batches; see :class:`~rethink_prune.training.recording.Recorded`.

    Gradients are None before and after a step, recorded or not, so the two can alternate. A recording reads the
    learning rates from the device, so it stays when they change.

    Parameters
    ----------
    step : Step
        Has to launch the same work for every batch, and wait for nothing.
    model : torch.nn.Module
        What it trains.
    optimizer : Optimizer
        Its learning rates may change between steps.
    recorder : CudaRecorder
    """
    rates = _RatesOnDevice(optimizer, next(model.parameters()).device)

    def with_rates(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with rates.read_by_the_optimizer():
            return step(images, labels)

    recorded = Recorded(
        "training steps",
        # Plain steps as well: with rates as numbers they would round otherwise, and a resumed training has other ones.
        with_rates,
        recorder,
        refresh=rates.refresh,
        # A recording that broke off may leave gradients.
        clean_up=lambda: model.zero_grad(set_to_none=True),
    )

    def replayed(images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        # Steps of several processes are not recorded, so the weight is one.
        return recorded(images, labels)

    return replayed


class _RatesOnDevice:
    """The learning rates of an optimiser, copied to where a recorded step can read them."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._tensors = [torch.zeros((), device=device) for _ in self._groups]
        self._values: list[float] = []

    def refresh(self) -> None:
        """Copy the rates if they have changed."""
        values = [float(group["lr"]) for group in self._groups]
        if values != self._values:
            self._values = values
            for tensor, value in zip(self._tensors, values, strict=True):
                tensor.fill_(value)

    @contextmanager
    def read_by_the_optimizer(self) -> Iterator[None]:
        """Let the optimiser, and hooks, take the copies in the body."""
        values = [group["lr"] for group in self._groups]
        for group, tensor in zip(self._groups, self._tensors, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, value in zip(self._groups, values, strict=True):
                group["lr"] = value
