"""Scaling factors: the structures whose outputs they can scale, and how they are trained.

Structures are residual branches, and groups or channels of a layer.

Huang and Wang (2018) minimise the loss plus ``strength * sum |factor|``: the weights by the recipe's optimiser, the
factors by Nesterov's method with a soft threshold, which sets factors to zero exactly. With learning rate ``lr`` and
the factors ``y`` that the forward pass uses, a step is ::

    x_new = max(0, soft_threshold(y - lr * gradient, lr * strength))
    y_new = max(0, x_new + momentum * (x_new - x))

As in the authors' code, no factor is negative: one that passes zero would turn a structure's sign instead of removing
it. `strength` weighs the L1 norm against the mean loss of a batch, so it does not depend on the batch size. Its unit is
that of the authors' code (MXNet's optimiser divides gradients by the batch size, then shrinks by ``lr * gamma``): their
``gamma = 0.01`` for ResNet-50 on ImageNet is ``strength=0.01`` here.

The publication writes ``v_new = x_new - y + momentum * v; y_new = x_new + momentum * v_new``, which is the same with
``v_new = x_new - x``. This form takes no difference that rounding could keep from zero: a factor that stays at zero is
exactly zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.branches import is_addition, remove_branches
from rethink_prune.surgery.channels import ChannelGroup, Positions
from rethink_prune.surgery.graph import infer_values, module_calls, operation_name, trace
from rethink_prune.training.hooks import TrainingFailed, TrainingHooks

Kind = Literal["blocks", "groups", "channels"]
KINDS: tuple[Kind, ...] = ("blocks", "groups", "channels")

# Modules and operations that may stand between a branch's last convolution or batch norm and the addition.
_KEEP_ZERO = ("Identity", "Dropout", "Dropout2d", "ReLU", "dropout", "stochastic_depth", "relu", "mul")
# Exact classes: a subclass may compute something that no weights express when it is scaled.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# Factors start at one.
LARGEST_FACTOR = 100.0


@dataclass(frozen=True)
class Structure:
    """What may go unit by unit: a residual branch (one unit), or the groups or channels of a layer.

    Attributes
    ----------
    name : str
        The branch's last module, or the channel group's name.
    kind : {"blocks", "groups", "channels"}
    module : str
        The convolution or batch norm that gives the structure's output; its factors sit there.
    units : tuple of tuple of int
        Output channels of that module, for each unit.
    """

    name: str
    kind: Kind
    module: str
    units: tuple[Positions, ...]

    def magnitudes(self, model: nn.Module) -> torch.Tensor:
        """Return the largest absolute weight or bias of each unit, which is zero if and only if it outputs zeros.

        Parameters
        ----------
        model : torch.nn.Module
            The network; `can_scale` of the structure's module.

        Returns
        -------
        torch.Tensor
            Shape ``(len(units),)``.

        Examples
        --------
        >>> norm = nn.BatchNorm2d(3)  # its weights start at one, its biases at zero
        >>> norm.weight.data[:] = torch.tensor([0.0, -2.0, 0.5])
        >>> Structure("0", "channels", "0", ((0,), (1, 2))).magnitudes(nn.Sequential(norm))
        tensor([0., 2.])
        """
        module = model.get_submodule(self.module)
        weight = module.get_parameter("weight").detach()
        magnitudes = weight.reshape(len(weight), -1).abs().amax(1)
        if isinstance(module.bias, torch.Tensor):
            magnitudes = torch.maximum(magnitudes, module.bias.detach().abs())
        return torch.stack([magnitudes[list(positions)].amax() for positions in self.units])


def find_blocks(model: nn.Module, example: torch.Tensor) -> tuple[tuple[Structure, ...], str | None]:
    """Find the residual branches of a network that factors can scale.

    A branch is the operand of an addition with more convolutions of its own; the other operand, with one at most (a
    projection), is the shortcut.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    example : torch.Tensor
        One batch of its input.

    Returns
    -------
    blocks : tuple of Structure
    problem : str, or None
        Why there are none, although there are branches.

    Examples
    --------
    >>> from rethink_prune import build_model
    >>> blocks, problem = find_blocks(build_model("resnet20"), torch.zeros(1, 3, 32, 32))
    >>> [block.name for block in blocks][:2], problem
    (['layer1.0.bn2', 'layer1.1.bn2'], None)
    """
    network = on_meta(model)
    graph = trace(network)
    values = infer_values(graph, network, tuple(example.shape))
    modules = dict(network.named_modules())
    calls = module_calls(graph)
    convolutions: dict[fx.Node, frozenset[fx.Node]] = {}  # those each node depends on
    ends: list[str] = []
    for node in graph.nodes:
        is_convolution = node.op == "call_module" and isinstance(modules[str(node.target)], _ConvNd)
        operands = node.all_input_nodes
        own_convolution = frozenset([node] if is_convolution else ())
        convolutions[node] = own_convolution.union(*(convolutions[operand] for operand in operands))
        # Not an addition of numbers, such as sizes.
        if not (is_addition(node) and all(isinstance(values[value], torch.Tensor) for value in (node, *operands))):
            continue
        # What both operands depend on lies before the block; the rest of each is its own.
        common = frozenset.intersection(*(convolutions[operand] for operand in operands))
        own = {operand: len(convolutions[operand] - common) for operand in operands}
        shortcut, branch = sorted(own, key=own.__getitem__)
        # As many of its own on both sides: neither is the shortcut.
        if own[shortcut] > 1 or own[shortcut] == own[branch] or values[shortcut].shape != values[node].shape:
            continue
        end = _last_module(branch, modules)
        if end is not None and len(calls[end]) == 1:
            ends.append(end)
    if not ends:
        return (), None
    try:
        remove_branches(network, ends)
    except UserError as error:
        return (), str(error)
    widths = {end: len(modules[end].get_parameter("weight")) for end in ends}
    return tuple(Structure(end, "blocks", end, (tuple(range(width)),)) for end, width in widths.items()), None


def find_layers(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[tuple[Structure, ...], Mapping[str, str]]:
    """Find where factors can scale groups of channels.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    groups : sequence of ChannelGroup
        From its analysis.

    Returns
    -------
    layers : tuple of Structure
        Of the kind "groups" where a unit is a group of a grouped convolution.
    left_whole : mapping of str to str
        The other groups of convolutions by name, with the reason.

    Examples
    --------
    >>> from rethink_prune.surgery.channels import analyse
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> layers, left_whole = find_layers(model, analyse(model, torch.zeros(1, 3, 8, 8)).groups())
    >>> [(layer.name, layer.kind, layer.module) for layer in layers]
    [('0', 'channels', '1')]
    """
    network = on_meta(model)
    calls = module_calls(trace(network))
    layers: list[Structure] = []
    left_whole: dict[str, str] = {}
    for group in groups:
        if group.kind != "conv":
            continue
        own = {*group.layers, *group.norms}
        if any(len(calls.get(name, ())) != 1 for name in own):
            left_whole[group.name] = "one of its layers runs more than once, or in training alone"
            continue
        passed = _modules_in_a_row(calls[group.layers[0]][0])
        last = [name for name in passed if name in own][-1]
        units = group.norms[last] if last in group.norms else tuple(unit[last] for unit in group.units)
        # A factor silences channels for all their readers only where all of them pass before anything else reads them.
        if own - set(passed) or not all(units):
            left_whole[group.name] = "no single convolution or batch norm outputs its channels to all their readers"
        elif not can_scale(network.get_submodule(last)):
            left_whole[group.name] = f"{last}: cannot be scaled"
        else:
            unit = group.units[0].items()
            grouped = any(network.get_submodule(layer).groups != 1 and len(positions) > 1 for layer, positions in unit)
            layers.append(Structure(group.name, "groups" if grouped else "channels", last, units))
    return tuple(layers), left_whole


def _modules_in_a_row(node: fx.Node) -> list[str]:
    """Return the modules that a result passes one after the other before a second value or reader comes in."""
    passed = [str(node.target)]
    while len(node.users) == 1:
        (node,) = node.users
        if len(node.all_input_nodes) != 1:
            break
        if node.op == "call_module":
            passed.append(str(node.target))
    return passed


def _last_module(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the module a branch ends in, if it can be scaled, and if its zeros reach the addition as zeros."""
    while len(node.users) == 1:
        if node.op == "call_module" and can_scale(modules[str(node.target)]):
            return str(node.target)
        name = type(modules[str(node.target)]).__name__ if node.op == "call_module" else operation_name(node)
        if name not in _KEEP_ZERO or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return None


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
            "least": 0,  # earlier versions let factors go below zero
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
            proximal = (factor - lr * factor.grad - lr * self._strength).clamp_(min=0)
            factor.copy_((proximal + self._momentum * (proximal - before)).clamp_(min=0))
            before.copy_(proximal)
            factor.grad = None

    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        """Return the share of factors that are zero, in percent; raise if a factor has run away.

        Raises
        ------
        TrainingFailed
            If a factor is larger than `LARGEST_FACTOR`: weights and factors have driven each other up, and what is left
            is no result of the penalty.
        """
        factors = torch.cat([module.factor.detach().cpu() for module in self._scaled(model)])
        if float(factors.max()) > LARGEST_FACTOR:
            raise TrainingFailed(
                f"a scaling factor became {float(factors.max()):.3g}, where they start at 1: their training is not "
                "stable; lower recipe.lr or pruner.sparse.momentum"
            )
        return {"zero_factors": 100.0 * float((factors == 0).float().mean())}

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


def _scale_output(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    # The factors keep their precision under autocast; the output keeps its type.
    scale = _channel_scale(module).to(output.dtype)
    return output * scale.view(-1, *[1] * (output.ndim - 2))


def _channel_scale(module: Any) -> torch.Tensor:
    """Return the factor of each output channel; the one behind the last is for channels of no unit."""
    return F.pad(module.factor, (0, 1), value=1.0)[module.factor_of_channel]
