"""One step of training: forward, loss, backward, update."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from rethink_prune.errors import UserError
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime

LossAndLogits = tuple[torch.Tensor, torch.Tensor]


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
                logits = self.forward(images)
            # In float32 also where the logits are bfloat16, whose 8 bits are too few for a softmax.
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
            (loss * weight).backward()
            lr = self.optimizer.param_groups[0]["lr"]
            self.hooks.before_step(self.model, lr)
            self.optimizer.step()
            self.hooks.after_step(self.model, lr)
            # At the end, not before the next forward pass: no gradient takes memory while the network is evaluated.
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()


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
