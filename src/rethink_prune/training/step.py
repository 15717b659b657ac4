"""One step of training: plain, through ``torch.compile``, or as a recorded CUDA graph.

A small network at a small batch leaves a GPU waiting for Python, so with ``accelerate=auto`` a step on CUDA is recorded
once as a CUDA graph and then replayed: the same kernels in the same order, launched together. With
``accelerate=compile`` the network goes through ``torch.compile`` as well, on any device. Where either is not possible,
the step is done plainly, and one line of the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import UserError, first_line
from rethink_prune.outputs import main_output, output_loss
from rethink_prune.training.distributed import is_connection_error
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime

log = logging.getLogger(__name__)

# Plain steps before a recording: they create the optimiser's state and cuBLAS's work space, and let cuDNN choose.
WARM_UP = 3
_NOT_RECORDED = "accelerate: no CUDA graph, because %s; kernels are launched one by one"
LossAndLogits = tuple[torch.Tensor, torch.Tensor]


def build_step(
    model: nn.Module,
    optimizer: Optimizer,
    hooks: TrainingHooks,
    *,
    runtime: Runtime,
    forward: nn.Module | None = None,
    label_smoothing: float = 0.0,
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
    >>> first, logits = step(images, labels)
    >>> second, logits = step(images, labels)
    >>> bool(second < first), logits.shape
    (True, torch.Size([4, 3]))
    """
    # The network itself goes to the hooks, which know its parameters by their own names.
    plain = PlainStep(model, forward or model, optimizer, hooks, runtime, label_smoothing)
    step = CompiledStep(plain) if runtime.accelerate == "compile" else plain
    if not runtime.accelerates_cuda:
        return step
    if not hooks.replayable:
        why_not = f"{type(hooks).__name__} does not say that its steps can be replayed (replayable = True)"
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        why_not = "several processes train together"
    else:
        return RecordedStep(step, model, optimizer, CudaRecorder(runtime.device))
    log.warning(_NOT_RECORDED, why_not)
    return step


class Step(Protocol):
    """Trains a network on one batch; what it returns may be overwritten by the next step."""

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Return the mean loss and the logits; the gradients are those of the loss times `weight`."""


@dataclass(frozen=True)
class PlainStep:
    """Forward, backward and one step of the optimiser.

    Attributes
    ----------
    model : torch.nn.Module
        What the hooks see.
    forward : callable
        The same network, perhaps wrapped for several processes, or compiled.
    """

    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: Optimizer
    hooks: TrainingHooks
    runtime: Runtime
    label_smoothing: float

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch; raise `UserError` if ``deterministic=true`` refuses an operation."""
        with _translate_refused_operations():
            # Forward alone: the backward pass takes the types that the forward pass has chosen.
            with self.runtime.autocast():
                output = self.forward(images)
            loss = output_loss(output, labels, label_smoothing=self.label_smoothing)
            (loss * weight).backward()
            lr = self.optimizer.param_groups[0]["lr"]
            self.hooks.before_step(self.model, lr)
            self.optimizer.step()
            self.hooks.after_step(self.model, lr)
            # At the end, not before the next forward pass: no gradient takes memory while the network is evaluated.
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), main_output(output).detach()


@contextmanager
def _translate_refused_operations() -> Iterator[None]:
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
    """The step through ``torch.compile``, and the plain step from the first failure on."""

    def __init__(self, plain: PlainStep) -> None:
        # Without a reset, code compiled for another network could be taken for this one, whose forward hooks differ.
        torch.compiler.reset()
        # There are two shapes only, the full batch and the last one: each gets code of its own, which is faster.
        self._step = replace(plain, forward=torch.compile(plain.forward, dynamic=False))
        self._plain = plain

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch."""
        try:
            return self._step(images, labels, weight)
        except RuntimeError as error:
            if self._step is self._plain or is_connection_error(error):
                raise
            # An error that has nothing to do with compilation comes again in the plain step, and is raised there.
            self._step = self._plain
            # The failed backward pass may have left gradients, to which the plain step would add its own.
            self._plain.model.zero_grad(set_to_none=True)
            log.warning("accelerate=compile: torch.compile failed: %s; going on without it", first_line(error))
        return self._plain(images, labels, weight)


@dataclass
class RecordedStep:
    """Replays a step for full batches; others, such as the last of an epoch, are done by the step itself.

    A full batch is one whose shape has come `WARM_UP` times in a row: these are ordinary steps, so that recording
    changes nothing. Learning rates are part of a recording, which is made anew when they have changed. Gradients are
    None before and after a step, recorded or not, so the two can alternate.

    Networks that draw random numbers (dropout) are not recorded: the draws of every step have a seed of their own. Nor
    are steps of several processes, so a recorded step's weight is one.

    Attributes
    ----------
    step : Step
        Has to launch the same work for every batch, and wait for nothing.
    model : torch.nn.Module
        What it trains.
    optimizer : Optimizer
        Has the learning rates.
    """

    step: Step
    model: nn.Module
    optimizer: Optimizer
    recorder: CudaRecorder
    _shape: torch.Size | None = None
    _warm: int = 0
    _rates: list[float] = field(default_factory=list)
    _replay: Callable[[torch.Tensor, torch.Tensor], LossAndLogits] | None = None
    _given_up: bool = False

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch."""
        if self._replay is None and images.shape != self._shape:
            self._shape, self._warm = images.shape, 0
        if self._given_up or images.shape != self._shape:
            return self.step(images, labels, weight)
        if self._warm < WARM_UP:
            self._warm += 1
            return self.recorder.warm_up(partial(self.step, images, labels, weight))
        # A graph holds the learning rates as constants.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self._replay is None or self._rates != rates:
            self._rates = rates
            self._record(images.clone(), labels.clone())
        return (self._replay or self.step)(images, labels)

    def _record(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the step on these tensors, from whose addresses every replay reads; or give up and say why."""
        # Frees the memory of the old recording before the new one takes its own.
        self._replay = None
        try:
            if self.recorder.draws:
                raise RuntimeError("the network draws random numbers")
            launch, outputs = self.recorder.record(partial(self.step, images, labels))
        except RuntimeError as error:
            # A recording that broke off may leave gradients.
            self.model.zero_grad(set_to_none=True)
            self._given_up = True
            log.warning(_NOT_RECORDED, first_line(error))
            return

        def replay(new_images: torch.Tensor, new_labels: torch.Tensor) -> LossAndLogits:
            images.copy_(new_images)
            labels.copy_(new_labels)
            launch()
            return outputs

        self._replay = replay


class CudaRecorder:
    """Records work on a CUDA device as a CUDA graph.

    Attributes
    ----------
    draws : bool
        Whether work that was warmed up took random numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA records no work of the default stream. Warm-up runs here as well, so that memory is reused.
        self._stream = torch.cuda.Stream(device)
        self.draws = False

    def warm_up(self, work: Callable[[], LossAndLogits]) -> LossAndLogits:
        """Do the work for real, on the stream where it will be recorded, in turn with that of the current one."""
        current = torch.cuda.current_stream(self._device)
        offset = self._random_offset()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work()
        current.wait_stream(self._stream)
        self.draws |= self._random_offset() != offset
        return outputs

    def record(self, work: Callable[[], LossAndLogits]) -> tuple[Callable[[], None], LossAndLogits]:
        """Return what launches the graph, and the tensors that a launch fills; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # The default mode, global, would also fail on what other threads do meanwhile, such as loading images.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs

    def _random_offset(self) -> int:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index].get_offset()
