"""Scaling factors on the outputs of structures, trained by the accelerated proximal gradient method.

Huang and Wang (2018) minimise the loss plus ``strength * sum |factor|``: the weights by the recipe's optimiser, the
factors by Nesterov's method with a soft threshold, which sets factors to zero exactly. With learning rate ``lr`` and
the factors ``y`` that the forward pass uses, a step is ::

    x_new = soft_threshold(y - lr * gradient, lr * strength)
    y_new = x_new + momentum * (x_new - x)

The publication writes ``v_new = x_new - y + momentum * v; y_new = x_new + momentum * v_new``, which is the same with
``v_new = x_new - x``. This form takes no difference that rounding could keep from zero: a factor that stays at zero is
exactly zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.surgery.plan import Positions
from rethink_prune.training.hooks import TrainingHooks

# Exact classes: a subclass may compute something that no weights express when it is scaled.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ScalingFactors(TrainingHooks):
    """Multiplies outputs by factors that start at one, trains them, and folds them into the weights at the end.

    Parameters
    ----------
    units : mapping of str to sequence of tuple of int
        By the name of a convolution or batch norm: the output channels of each of its units, which share a factor.
        Channels of no unit are not scaled.
    strength : float
        Weight of the factors' L1 norm in the loss.
    momentum : float
        In [0, 1).
    """

    replayable = True

    def __init__(self, units: Mapping[str, Sequence[Positions]], *, strength: float, momentum: float) -> None:
        self._units = units
        self._strength = strength
        self._momentum = momentum

    @property
    def key(self) -> Mapping[str, Any]:
        """How many factors are where, and how they are trained."""
        return {
            "factors": {module: len(units) for module, units in self._units.items()},
            "strength": self._strength,
            "momentum": self._momentum,
        }

    def prepare(self, model: nn.Module) -> None:
        """Give the modules a parameter ``factor``, the step's state and a hook that scales what they return."""
        for name, units in self._units.items():
            module: Any = model.get_submodule(name)
            unit_of = torch.full((len(module.weight),), len(units), device=module.weight.device)
            for unit, positions in enumerate(units):
                unit_of[list(positions)] = unit
            module.factor = nn.Parameter(torch.ones(len(units), dtype=module.weight.dtype, device=module.weight.device))
            # A buffer, so that checkpoints hold the step's state.
            module.register_buffer("factor_before", torch.ones_like(module.factor.data))
            module.register_buffer("factor_of_channel", unit_of, persistent=False)
            # On the module, so that a copy of the network has a handle of its own.
            module.factor_hook = module.register_forward_hook(_scale_output)

    def optimized(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return all parameters but the factors: these have a step of their own, and no weight decay."""
        factors = {id(module.factor) for module in self._scaled(model)}
        return [parameter for parameter in model.parameters() if id(parameter) not in factors]

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        """Take one step with the factors, and clear their gradients, which no optimiser does."""
        for module in self._scaled(model):
            factor, before = module.factor, module.factor_before
            if factor.grad is None:  # its layer took no part in this step
                continue
            proximal = F.softshrink(factor - lr * factor.grad, lr * self._strength)
            factor.copy_(proximal + self._momentum * (proximal - before))
            before.copy_(proximal)
            factor.grad = None

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Multiply weights and biases by their channels' factors, and remove what `prepare` added."""
        for module in self._scaled(model):
            scale = _channel_scale(module)
            module.weight.mul_(scale.view(-1, *[1] * (module.weight.ndim - 1)))
            if module.bias is not None:
                module.bias.mul_(scale)
            module.factor_hook.remove()
            del module.factor_hook, module.factor, module.factor_before, module.factor_of_channel

    def _scaled(self, model: nn.Module) -> Iterator[Any]:
        return map(model.get_submodule, self._units)


def can_scale(module: nn.Module) -> bool:
    """Tell whether factors on the output of this module can be folded into its weights.

    Examples
    --------
    >>> can_scale(nn.Conv2d(3, 8, 3)), can_scale(nn.BatchNorm2d(8)), can_scale(nn.BatchNorm2d(8, affine=False))
    (True, True, False)
    """
    return type(module) in _CONVS or (type(module) in _NORMS and bool(module.affine))


def unit_magnitudes(module: nn.Module, units: Sequence[Positions]) -> torch.Tensor:
    """Return the largest absolute weight or bias of each unit, which is zero if and only if it outputs zeros.

    Parameters
    ----------
    module : torch.nn.Module
        A convolution or batch norm that `can_scale`.
    units : sequence of tuple of int
        Output channels of each unit.

    Returns
    -------
    torch.Tensor
        Shape ``(len(units),)``.

    Examples
    --------
    >>> norm = nn.BatchNorm2d(3)  # its weights start at one, its biases at zero
    >>> norm.weight.data[:] = torch.tensor([0.0, -2.0, 0.5])
    >>> unit_magnitudes(norm, [(0,), (1, 2)])
    tensor([0., 2.])
    """
    weight = module.get_parameter("weight").detach()
    magnitudes = weight.reshape(len(weight), -1).abs().amax(1)
    if isinstance(module.bias, torch.Tensor):
        magnitudes = torch.maximum(magnitudes, module.bias.detach().abs())
    return torch.stack([magnitudes[list(positions)].amax() for positions in units])


def _scale_output(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    # The factors keep their precision under autocast; the output keeps its type.
    scale = _channel_scale(module).to(output.dtype)
    return output * scale.view(-1, *[1] * (output.ndim - 2))


def _channel_scale(module: Any) -> torch.Tensor:
    """Return the factor of each output channel; the one behind the last is for channels of no unit."""
    return F.pad(module.factor, (0, 1), value=1.0)[module.factor_of_channel]
