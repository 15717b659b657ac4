"""How a pruner takes part in training: what the training loop calls, and when."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rethink_prune.surgery.architecture import Masks, apply_masks


class TrainingFailed(Exception):
    """Raised by hooks after an epoch: what was trained is no result; the message says why."""


class TrainingHooks:
    """Does nothing; a pruner that trains its own way, or weights that are masked, override what they need.

    Everything that changes during training has to live in the network (parameters, buffers), whose state is what
    checkpoints hold.

    Examples
    --------
    A hook that limits the gradients:

    >>> class ClippedGradients(TrainingHooks):
    ...     replayable = True  # no number is read from the device
    ...
    ...     def before_step(self, model: nn.Module, lr: float) -> None:
    ...         nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
        """Act between the backward pass and the optimiser's step, at learning rate `lr`.

        Where steps are recorded, `lr` is a tensor without dimensions on the device: compute with it as with a number.
        """

    def after_step(self, model: nn.Module, lr: float) -> None:
        """Act after the optimiser's step; the gradients are still there."""

    def after_epoch(self, model: nn.Module) -> Mapping[str, float] | None:
        """Act after an epoch's last step, before the network is evaluated; weights change in place.

        What is returned gets columns of ``metrics.csv`` of these names; the means over epochs stand in the summary.
        """
        return None

    def finish(self, model: nn.Module) -> None:
        """Undo in place what `prepare` did, so that the network has its own state-dict keys again."""


class HeldMasks(TrainingHooks):
    """Keeps masked weights at zero.

    Parameters
    ----------
    masks : mapping of str to torch.Tensor
        By parameter name: True where a weight remains, in the parameter's shape.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> hooks = HeldMasks({"weight": torch.tensor([[True, False]])})
    >>> hooks.prepare(model)
    >>> model(torch.ones(2)).backward()
    >>> hooks.before_step(model, 0.1)
    >>> model.weight.grad
    tensor([[1., 0.]])
    """

    replayable = True

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._gone = {name: ~mask for name, mask in masks.items()}

    def prepare(self, model: nn.Module) -> None:
        """Set masked weights to zero."""
        apply_masks(model, self._masks)

    def before_step(self, model: nn.Module, lr: float) -> None:
        """Set the gradients of masked weights to zero."""
        # This is enough: where weight and gradient are zero, momentum and weight decay are zero as well.
        for name, gone in self._gone.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                # Moved in the first step; later ones, which may be recorded, find the mask on the device.
                self._gone[name] = gone.to(gradient.device)
                gradient.masked_fill_(self._gone[name], 0.0)
