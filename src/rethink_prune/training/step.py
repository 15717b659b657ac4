"""One step of training, done plainly or at the speed of the hardware.

A small network at a small batch leaves a GPU waiting for Python, so with ``accelerate=auto`` a step on CUDA is recorded
once as a CUDA graph and then replayed: the same kernels in the same order, launched together. With
``accelerate=compile`` the network goes through ``torch.compile`` as well, on any device. Where either is not possible,
the step is done plainly, and one line of the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import UserError
from rethink_prune.training.distributed import is_lost
from rethink_prune.training.precision import autocast

if TYPE_CHECKING:
    from rethink_prune.training.train import Hooks

log = logging.getLogger(__name__)

LossAndLogits = tuple[torch.Tensor, torch.Tensor]

# Before a recording, so that the optimiser's state, cuDNN's choices and cuBLAS's work space are there.
WARM_UP = 3


class Step(Protocol):
    """Trains a network on one batch."""

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Return the mean loss and the logits; the gradients are those of the loss times `weight`."""


def build_step(
    model: nn.Module,
    optimizer: Optimizer,
    hooks: Hooks,
    *,
    forward: nn.Module | None = None,
    device: torch.device,
    precision: str,
    accelerate: str,
    label_smoothing: float = 0.0,
) -> Step:
    """Return what trains `model` on one batch: images and labels in, the mean loss and the logits out.

    What comes out may be overwritten by the next step.

    Parameters
    ----------
    model : torch.nn.Module
        On the device, with its optimiser's and hooks' parameters.
    optimizer : Optimizer
        Its learning rates may change between steps.
    hooks : Hooks
        Act before and after the optimiser's step.
    forward : torch.nn.Module, optional
        What to call instead of the network: several processes wrap it.
    device : torch.device
    precision : {"fp32", "bf16"}
    accelerate : {"auto", "compile", "off"}
    label_smoothing : float
        Of the loss.

    Notes
    -----
    A step raises `UserError` if ``deterministic=true`` refuses an operation.
    """
    forward = forward or model
    step: Step = PlainStep(model, forward, optimizer, hooks, device, precision, label_smoothing)
    if accelerate == "compile":
        # What was compiled for a network before would be taken for this one, even where its forward hooks differ.
        torch.compiler.reset()
        # Not dynamic: there are two shapes, the full batch and the last one.
        faster = torch.compile(forward, dynamic=False)
        compiled = PlainStep(model, faster, optimizer, hooks, device, precision, label_smoothing)
        step = CompiledStep(compiled, step, model)
    if accelerate == "off" or device.type != "cuda":
        return step
    why_not = _why_not_recorded(hooks)
    if why_not is None:
        return RecordedStep(step, model, optimizer, CudaRecorder(device))
    _tell_not_recorded(why_not)
    return step


def _why_not_recorded(hooks: Hooks) -> str | None:
    if not hooks.replayable:
        return f"{type(hooks).__name__} does not say that its steps can be replayed (replayable = True)"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes train together"
    return None


def _tell_not_recorded(reason: str) -> None:
    log.warning("accelerate: no CUDA graph, because %s; kernels are launched one by one", reason)


@dataclass(frozen=True)
class PlainStep:
    """Forward, backward and one step of the optimiser.

    Attributes
    ----------
    model : torch.nn.Module
        What the hooks see.
    forward : callable
        The same network, perhaps wrapped or compiled.
    optimizer, hooks, device, precision, label_smoothing
        As for `build_step`.
    """

    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: Optimizer
    hooks: Hooks
    device: torch.device
    precision: str
    label_smoothing: float

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch; the gradients are gone afterwards."""
        with _refusals_explained():
            with autocast(self.device, self.precision):
                logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
            (loss * weight).backward()
            lr = self.optimizer.param_groups[0]["lr"]
            self.hooks.before_step(self.model, lr)
            self.optimizer.step()
            self.hooks.after_step(self.model, lr)
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()


@contextmanager
def _refusals_explained() -> Iterator[None]:
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
    """A step through ``torch.compile``, and the plain step where that fails.

    Parameters
    ----------
    compiled, plain : callable
        The two steps.
    model : torch.nn.Module
        What they train.
    """

    def __init__(self, compiled: Step, plain: Step, model: nn.Module) -> None:
        self._compiled: Step | None = compiled
        self._plain = plain
        self._model = model

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch."""
        if self._compiled is not None:
            try:
                return self._compiled(images, labels, weight)
            except RuntimeError as error:
                if is_lost(error):
                    raise
                # What is no fault of compilation happens again in the plain step, and is raised there.
                self._compiled = None
                self._model.zero_grad(set_to_none=True)
                log.warning("accelerate=compile: torch.compile failed: %s; going on without it", _first_line(error))
        return self._plain(images, labels, weight)


class Recorder(Protocol):
    """What records work: `CudaRecorder`."""

    def warm_up(self, work: Callable[[], LossAndLogits]) -> LossAndLogits:
        """Do the work for real, the way it will be recorded."""

    def draws(self) -> bool:
        """Tell whether work that was warmed up took random numbers."""

    def record(self, work: Callable[[], LossAndLogits]) -> tuple[Callable[[], None], LossAndLogits]:
        """Return what replays the work, and the tensors that a replay fills; nothing is computed yet."""


class RecordedStep:
    """Replays a step for full batches; others, such as the last of an epoch, are done by the step itself.

    A full batch is one whose shape has come `WARM_UP` times in a row: these are ordinary steps, so that recording
    changes nothing. Learning rates are part of a recording, which is made anew when they have changed. Gradients are
    None before and after a step, recorded or not, so the two can alternate.

    Networks that draw random numbers (dropout) are not recorded: the draws of every step have a seed of their own. Nor
    are steps of several processes, so a recorded step's weight is one.

    Parameters
    ----------
    step : callable
        Has to launch the same work for every batch, and wait for nothing.
    model : torch.nn.Module
        What it trains.
    optimizer : Optimizer
        Has the learning rates.
    recorder : Recorder
    """

    def __init__(self, step: Step, model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
        self._step = step
        self._model = model
        self._optimizer = optimizer
        self._recorder = recorder
        self._shape: torch.Size | None = None
        self._warm = 0
        self._recording: _Recording | None = None
        self._given_up = False

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch."""
        if self._recording is None and images.shape != self._shape:
            self._shape, self._warm = images.shape, 0
        if self._given_up or images.shape != self._shape:
            return self._step(images, labels, weight)
        if self._warm < WARM_UP:
            self._warm += 1
            return self._recorder.warm_up(partial(self._step, images, labels, weight))
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if self._recording is None or self._recording.rates != rates:
            self._record(images, labels, rates)
        if self._recording is None:
            return self._step(images, labels)
        return self._recording.replay(images, labels)

    def _record(self, images: torch.Tensor, labels: torch.Tensor, rates: list[float]) -> None:
        """Record the step at these learning rates, or give up."""
        self._recording = None  # frees its memory first
        if self._recorder.draws():
            self._give_up("the network draws random numbers")
            return
        # Not clones of the batch alone: they stay, and every batch is copied into them.
        images, labels = images.clone(), labels.clone()
        try:
            replay, outputs = self._recorder.record(partial(self._step, images, labels))
        except RuntimeError as error:
            self._model.zero_grad(set_to_none=True)  # what a recording that broke off has left
            self._give_up(_first_line(error))
            return
        self._recording = _Recording(images, labels, rates, replay, outputs)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        _tell_not_recorded(reason)


@dataclass(frozen=True)
class _Recording:
    """A recorded step: the tensors it reads and fills, and the learning rates it was made at."""

    images: torch.Tensor
    labels: torch.Tensor
    rates: list[float]
    launch: Callable[[], None]
    outputs: LossAndLogits

    def replay(self, images: torch.Tensor, labels: torch.Tensor) -> LossAndLogits:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.launch()
        return self.outputs


class CudaRecorder:
    """Records work as a CUDA graph.

    Parameters
    ----------
    device : torch.device
        The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA records no work of the default stream; the work is warmed up where it will be recorded.
        self._stream = torch.cuda.Stream(device)
        self._draws = False

    def warm_up(self, work: Callable[[], LossAndLogits]) -> LossAndLogits:
        """Do the work on the recording's stream, in turn with that of the current one."""
        current = torch.cuda.current_stream(self._device)
        offset = self._random_offset()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work()
        current.wait_stream(self._stream)
        self._draws |= self._random_offset() != offset
        return outputs

    def draws(self) -> bool:
        """Tell whether the generator of the device has moved."""
        return self._draws

    def record(self, work: Callable[[], LossAndLogits]) -> tuple[Callable[[], None], LossAndLogits]:
        """Return what launches the graph, and its outputs."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread has to keep from what cannot be recorded: others may be loading images.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs

    def _random_offset(self) -> int:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index].get_offset()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
