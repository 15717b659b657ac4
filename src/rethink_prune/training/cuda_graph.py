"""A training step that is recorded once as a CUDA graph and then replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import first_line
from rethink_prune.training.step import LossAndLogits, Step

log = logging.getLogger(__name__)

# Before a recording, so that the optimiser's state, cuDNN's choices and cuBLAS's work space are there.
WARM_UP = 3


def log_not_recorded(reason: str) -> None:
    """Say why steps are done without a CUDA graph.

    Examples
    --------
    >>> log_not_recorded("several processes train together")
    """
    log.warning("accelerate: no CUDA graph, because %s; kernels are launched one by one", reason)


class CudaRecorder:
    """Records work on a CUDA device as a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA records no work of the default stream; the work is warmed up where it will be recorded.
        self._stream = torch.cuda.Stream(device)
        self._draws = False

    def warm_up(self, work: Callable[[], LossAndLogits]) -> LossAndLogits:
        """Do the work for real, on the stream where it will be recorded, in turn with that of the current one."""
        current = torch.cuda.current_stream(self._device)
        offset = self._random_offset()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work()
        current.wait_stream(self._stream)
        self._draws |= self._random_offset() != offset
        return outputs

    def draws(self) -> bool:
        """Tell whether work that was warmed up took random numbers: whether the device's generator has moved."""
        return self._draws

    def record(self, work: Callable[[], LossAndLogits]) -> tuple[Callable[[], None], LossAndLogits]:
        """Return what launches the graph, and the tensors that a launch fills; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # The strict default would also fail on what other threads do meanwhile, such as loading images.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs

    def _random_offset(self) -> int:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index].get_offset()


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
            if self.recorder.draws():
                raise RuntimeError("the network draws random numbers")
            launch, outputs = self.recorder.record(partial(self.step, images, labels))
        except RuntimeError as error:
            # A recording that broke off may leave gradients.
            self.model.zero_grad(set_to_none=True)
            self._given_up = True
            log_not_recorded(first_line(error))
            return

        def replay(new_images: torch.Tensor, new_labels: torch.Tensor) -> LossAndLogits:
            images.copy_(new_images)
            labels.copy_(new_labels)
            launch()
            return outputs

        self._replay = replay
