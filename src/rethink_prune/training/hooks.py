"""How a pruner takes part in training: what the training loop calls, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rethink_prune.surgery.masks import Masks, apply_masks


class TrainingHooks:
    """Does nothing; a pruner that trains its own way, or weights that are masked, override what they need.

    Everything that changes during training has to live in the network (parameters, buffers), whose state is what
    checkpoints hold.
    """

    @property
    def replayable(self) -> bool:
        """Whether `before_step` and `after_step` launch the same work every time and wait for no result.

        Then a GPU can replay a recorded step. Hooks that act on steps have to say so: what Python decides (a counter,
        a number read from the device) is decided once, when the step is recorded.
        """
        own = type(self)
        return own.before_step is TrainingHooks.before_step and own.after_step is TrainingHooks.after_step

    @property
    def key(self) -> Mapping[str, Any]:
        """What decides the result, beside the network, data and recipe; plain values, part of the stage's key."""
        return {}

    def prepare(self, model: nn.Module) -> None:
        """Change a freshly built network in place before anything else happens to it, e.g. add parameters."""

    def optimized(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters that the recipe's optimiser updates."""
        return model.parameters()

    def before_step(self, model: nn.Module, lr: float) -> None:
        """Act between the backward pass and the optimiser's step, at learning rate `lr`."""

    def after_step(self, model: nn.Module, lr: float) -> None:
        """Act after the optimiser's step; the gradients are still there."""

    def after_epoch(self, model: nn.Module) -> None:
        """Act after an epoch's last step, before the network is evaluated; weights change in place."""

    def finish(self, model: nn.Module) -> None:
        """Undo in place what `prepare` did, so that the network has its own state-dict keys again."""


class HeldMasks(TrainingHooks):
    """Keeps masked weights at zero.

    With gradient zero and value zero, neither momentum nor weight decay can move a weight, so the gradients are all
    that needs masking.

    Parameters
    ----------
    masks : mapping of str to torch.Tensor
        By parameter name: True where a weight remains, in the parameter's shape.
    """

    replayable = True

    def __init__(self, masks: Masks) -> None:
        self._gone = {name: ~mask for name, mask in masks.items()}

    def prepare(self, model: nn.Module) -> None:
        """Set masked weights to zero."""
        apply_masks(model, {name: ~gone for name, gone in self._gone.items()})

    def before_step(self, model: nn.Module, lr: float) -> None:
        """Set the gradients of masked weights to zero."""
        for name, gone in self._gone.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                if gone.device != gradient.device:
                    gone = self._gone[name] = gone.to(gradient.device)
                gradient.masked_fill_(gone, 0.0)
