"""Structures whose outputs factors can scale: residual branches, and groups or channels of a layer."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.factors import can_scale
from rethink_prune.surgery.branches import is_addition, remove_branches
from rethink_prune.surgery.channels import ChannelGroup
from rethink_prune.surgery.graph import infer_values, operation_name, trace
from rethink_prune.surgery.plan import Positions

Kind = Literal["blocks", "groups", "channels"]
KINDS: tuple[Kind, ...] = ("blocks", "groups", "channels")

# Modules and operations that may stand between a branch's last convolution or batch norm and the addition.
_KEEP_ZERO = ("Identity", "Dropout", "Dropout2d", "ReLU", "dropout", "stochastic_depth", "relu", "mul")


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
        convolutions[node] = frozenset([node] if is_convolution else ()).union(
            *(convolutions[operand] for operand in node.all_input_nodes)
        )
        # What both operands depend on lies before the block; the rest of each is its own.
        if not is_addition(node):
            continue
        if not all(isinstance(values[operand], torch.Tensor) for operand in (node, *node.all_input_nodes)):
            continue  # an addition of numbers, such as sizes
        common = frozenset.intersection(*(convolutions[operand] for operand in node.all_input_nodes))
        own = {operand: len(convolutions[operand] - common) for operand in node.all_input_nodes}
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
    return tuple(
        Structure(end, "blocks", end, (tuple(range(len(modules[end].get_parameter("weight")))),)) for end in ends
    ), None


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
            grouped = any(
                network.get_submodule(layer).groups != 1 and len(positions) > 1
                for layer, positions in group.units[0].items()
            )
            layers.append(Structure(group.name, "groups" if grouped else "channels", last, units))
    return tuple(layers), left_whole


def module_calls(graph: fx.Graph) -> Mapping[str, list[fx.Node]]:
    """Return the nodes that call each module, by its name.

    Examples
    --------
    >>> {name: len(nodes) for name, nodes in module_calls(trace(nn.Sequential(nn.ReLU(), nn.ReLU()))).items()}
    {'0': 1, '1': 1}
    """
    calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    return calls


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
