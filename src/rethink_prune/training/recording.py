"""Work recorded once as a CUDA graph and then replayed: the same kernels in the same order, launched together.

A small network at a small batch leaves a GPU waiting for one kernel after the other to be launched. With
``accelerate=auto``, training steps and evaluation on CUDA are recorded. Where that is not possible, they are done
plainly, and one line of the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from rethink_prune.errors import first_line
from rethink_prune.training.hooks import TrainingHooks

log = logging.getLogger(__name__)

# Plain passes before a recording: they create the optimiser's state and cuBLAS's work space, and let cuDNN choose.
WARM_UP = 3
Made = TypeVar("Made")
Work = Callable[[torch.Tensor, torch.Tensor], Made]


@dataclass
class Recorded(Generic[Made]):
    """Replays work on full batches; on others, such as the last of an epoch, the work is done plainly.

    A full batch is one whose shape has come `WARM_UP` times in a row: these are done plainly as well, so that recording
    changes nothing.

    Work that draws random numbers (dropout) is not recorded: the draws of every step have a seed of their own.

    Attributes
    ----------
    what : str
        Names the work in the log.
    work : callable
        Takes images and labels, and gives tensors. It has to launch the same kernels for every batch, and to wait for
        nothing.
    recorder : CudaRecorder
    refresh : callable
        Brings what the work reads from the device up to date, before it is done.
    constants : callable
        Gives what a recording holds as constants, such as addresses: it is made anew when this has changed.
    clean_up : callable
        Removes what a recording that broke off may have left.
    """

    what: str
    work: Work[Made]
    recorder: CudaRecorder
    refresh: Callable[[], None] = lambda: None
    constants: Callable[[], list[int]] = list
    clean_up: Callable[[], None] = lambda: None
    _shape: torch.Size | None = None
    _warm: int = 0
    _constants: list[int] | None = None
    _replay: Work[Made] | None = None
    _given_up: bool = False

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Made:
        """Do the work on one batch; the next call may overwrite what this one returns."""
        self.refresh()
        if self._replay is None and images.shape != self._shape:
            self._shape, self._warm = images.shape, 0
        if self._given_up or images.shape != self._shape:
            return self.work(images, labels)
        if self._warm < WARM_UP:
            self._warm += 1
            return self.recorder.warm_up(partial(self.work, images, labels))
        constants = self.constants()
        if self._replay is None or self._constants != constants:
            self._constants = constants
            self._record(images.clone(), labels.clone())
        return (self._replay or self.work)(images, labels)

    def _record(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the work on these tensors, from whose addresses every replay reads; or give up and say why."""
        # Frees the memory of the old recording before the new one takes its own.
        self._replay = None
        try:
            if self.recorder.draws:
                raise RuntimeError("the network draws random numbers")
            launch, outputs = self.recorder.record(partial(self.work, images, labels))
        except torch.OutOfMemoryError:
            self.clean_up()
            raise
        except RuntimeError as error:
            self.clean_up()
            self._given_up = True
            warn_not_recorded(self.what, first_line(error))
            return

        def replay(new_images: torch.Tensor, new_labels: torch.Tensor) -> Made:
            images.copy_(new_images)
            labels.copy_(new_labels)
            launch()
            return outputs

        self._replay = replay


def why_not_recorded(hooks: TrainingHooks) -> str | None:
    """Return what keeps a training with these hooks from being recorded, if anything is known to.

    Examples
    --------
    >>> why_not_recorded(TrainingHooks()) is None
    True
    """
    if not hooks.replayable:
        return f"{type(hooks).__name__} does not say that its steps can be replayed (replayable = True)"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes train together"
    return None


def warn_not_recorded(what: str, why: str) -> None:
    """Say in the log that work is not recorded."""
    log.warning("accelerate: no CUDA graph of %s, because %s; kernels are launched one by one", what, why)


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

    def warm_up(self, work: Callable[[], Made]) -> Made:
        """Do the work for real, on the stream where it will be recorded, in turn with that of the current one."""
        current = torch.cuda.current_stream(self._device)
        offset = self._random_offset()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work()
        current.wait_stream(self._stream)
        self.draws |= self._random_offset() != offset
        return outputs

    def record(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """Return what launches the graph, and the tensors that a launch fills; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Else the graph would keep the work space that cuBLAS has for this stream. Streams come from a small pool, and
        # another recording, replayed at the same time, may have the same one (PyTorch before 2.15).
        torch._C._cuda_clearCublasWorkspaces()
        # The default mode, global, would also fail on what other threads do meanwhile, such as loading images.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, outputs

    def _random_offset(self) -> int:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index].get_offset()
