"""Choose how fast a training step runs: plain, through ``torch.compile``, or as a recorded CUDA graph.

A small network at a small batch leaves a GPU waiting for Python, so with ``accelerate=auto`` a step on CUDA is recorded
once as a CUDA graph and then replayed: the same kernels in the same order, launched together. With
``accelerate=compile`` the network goes through ``torch.compile`` as well, on any device. Where either is not possible,
the step is done plainly, and one line of the log says why.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import first_line
from rethink_prune.training.cuda_graph import CudaRecorder, RecordedStep, log_not_recorded
from rethink_prune.training.distributed import is_connection_error
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.step import LossAndLogits, PlainStep, Step

log = logging.getLogger(__name__)


def build_step(
    model: nn.Module,
    optimizer: Optimizer,
    hooks: TrainingHooks,
    *,
    runtime: Runtime,
    forward: nn.Module | None = None,
    label_smoothing: float = 0.0,
) -> Step:
    """Return what trains `model` on one batch: images and labels in, the mean loss and the logits out.

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
    plain = PlainStep(model, forward or model, optimizer, hooks, runtime, label_smoothing)
    step = CompiledStep(plain) if runtime.accelerate == "compile" else plain
    if not runtime.accelerates_cuda:
        return step
    if not hooks.replayable:
        log_not_recorded(f"{type(hooks).__name__} does not say that its steps can be replayed (replayable = True)")
        return step
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        log_not_recorded("several processes train together")
        return step
    return RecordedStep(step, model, optimizer, CudaRecorder(runtime.device))


class CompiledStep:
    """The step through ``torch.compile``, and the plain step from the first failure on."""

    def __init__(self, plain: PlainStep) -> None:
        # What was compiled for a network before would be taken for this one, even where its forward hooks differ.
        torch.compiler.reset()
        # Not dynamic: there are two shapes, the full batch and the last one.
        self._compiled: Step | None = replace(plain, forward=torch.compile(plain.forward, dynamic=False))
        self._plain = plain

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossAndLogits:
        """Train on one batch."""
        if self._compiled is not None:
            try:
                return self._compiled(images, labels, weight)
            except RuntimeError as error:
                if is_connection_error(error):
                    raise
                # An error that has nothing to do with compilation comes again in the plain step, and is raised there.
                self._compiled = None
                # The failed backward pass may have left gradients, to which the plain step would add its own.
                self._plain.model.zero_grad(set_to_none=True)
                log.warning("accelerate=compile: torch.compile failed: %s; going on without it", first_line(error))
        return self._plain(images, labels, weight)
