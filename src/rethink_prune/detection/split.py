"""Splits a classifier where its features have a stated stride: a body for whole pictures, a head for regions of them.

The classifier's traced graph is cut at one node; the parts are its own modules under their own names, so what is known
of a layer of the classifier (that it is pruned, or masked) holds for the layer of that name in the detector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.graph import infer_values, module_calls, trace

POOL = "pool"
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)
_TO_ONE_SIZE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Parts:
    """The two parts of a classifier; they share its modules.

    Attributes
    ----------
    body : torch.nn.Module
        N x C x H x W to N x `channels` x H / stride x W / stride.
    head : torch.nn.Module
        Regions x `channels` x k x k to regions x `features`.
    channels, features : int
    feature_reader : str
        Name of the first layer with weights that reads the body's output.
    classifier : str
        Name of the last linear layer, which is in neither.
    """

    body: nn.Module
    head: nn.Module
    channels: int
    features: int
    feature_reader: str
    classifier: str


def split_classifier(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    stride: int,
    body: str | None = None,
    head: str | None = None,
    region_size: int = 7,
) -> Parts:
    """Split a classifier in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits by a last linear layer, as any network of :mod:`rethink_prune.models` and most of torchvision's.
    input_shape : sequence of int
        Of one image, C x H x W.
    stride : int
        Pixels of a picture for each position of the body's output.
    body : str, optional
        Module with which the body ends; by default the last operation at that stride.
    head : str, optional
        Module with which the head ends, or ``pool`` for the mean over space alone; by default all that is left but the
        last linear layer. A pooling with which it would begin is left out: regions are pooled to `region_size` instead.
    region_size : int
        Positions of a region, each way.

    Raises
    ------
    UserError
        If there is no such place, or the head does not take regions.

    Examples
    --------
    >>> from rethink_prune import build_model
    >>> parts = split_classifier(build_model("resnet20").eval(), (3, 32, 32), stride=2)
    >>> parts.channels, parts.features, parts.feature_reader, parts.classifier
    (32, 64, 'layer3.0.conv1', 'fc')
    >>> parts.body(torch.zeros(1, 3, 48, 64)).shape
    torch.Size([1, 32, 24, 32])
    """
    name = type(model).__name__
    shapes = on_meta(model).eval()
    graph = trace(shapes)
    values = infer_values(graph, shapes, (1, *input_shape))
    nodes = list(graph.nodes)
    modules = dict(shapes.named_modules())
    classifier = _last_linear(nodes, modules, name)
    end = classifier.args[0]
    assert isinstance(end, fx.Node)
    cut = _body_end(nodes, values, end, input_shape[1], stride, body, name, modules)
    start = cut if head == POOL else _after_pooling(cut, modules)
    if head not in (None, POOL):
        end = _last_of(nodes, str(head), "transfer.head", name)
        if nodes.index(end) <= nodes.index(start):
            raise UserError(f"transfer.head={head}: comes before the end of the body, {cut.target}")
    body_graph = _part(graph, nodes, None, cut)
    head_graph = _part(graph, nodes, start, cut if head == POOL else end)
    channels = values[cut].shape[1]
    for node in nodes:
        if node.op == "get_attr" and "." not in str(node.target) and not hasattr(model, str(node.target)):
            # A tensor that the forward pass creates; the tracer put it into the module it traced.
            model.register_buffer(str(node.target), getattr(shapes, str(node.target)), persistent=False)
    head_module = _Head(fx.GraphModule(model, head_graph))
    features = _head_features(head_module, (channels, region_size, region_size))
    return Parts(
        body=fx.GraphModule(model, body_graph),
        head=head_module,
        channels=channels,
        features=features,
        feature_reader=_first_reader(head_graph, modules) or str(classifier.target),
        classifier=str(classifier.target),
    )


class _Head(nn.Module):
    """What runs on each region: layers of the classifier, and the mean over space where they leave some."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        """Return the features of regions."""
        found: torch.Tensor = self.layers(regions)
        return found.mean((2, 3)) if found.ndim == 4 else found.flatten(1)


def _last_linear(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], name: str) -> fx.Node:
    calls = [n for n in nodes if n.op == "call_module" and isinstance(modules.get(str(n.target)), nn.Linear)]
    if not calls:
        raise UserError(f"transfer: {name} has no last linear layer, so it is not known where its features are")
    return calls[-1]


def _body_end(
    nodes: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    end: fx.Node,
    image_size: int,
    stride: int,
    body: str | None,
    name: str,
    modules: Mapping[str, nn.Module],
) -> fx.Node:
    """Return the node with which the body ends."""
    strides = {
        node: _stride(image_size, values[node].shape[-1])
        for node in nodes[: nodes.index(end) + 1]
        if node.op in ("call_module", "call_function", "call_method") and _is_map(values.get(node))
    }
    # These have one size, whatever the picture's.
    for node in _of_one_size(nodes, modules):
        strides.pop(node, None)
    if body is not None:
        cut = _last_of(nodes, body, "transfer.body", name)
        if strides.get(cut) != stride:
            found = f"is at stride {strides[cut]:g}" if cut in strides else "gives no features in space"
            raise UserError(f"transfer.body={body}: {found} in {name}, not at transfer.stride={stride}")
        if not _separates(nodes, cut, end):
            raise UserError(f"transfer.body={body}: what follows reads other tensors as well; end the body elsewhere")
        return cut
    cuts = [node for node, found in strides.items() if found == stride and _separates(nodes, node, end)]
    if not cuts:
        there = ", ".join(f"{found:g}" for found in sorted({*strides.values()}))
        raise UserError(f"transfer.stride={stride}: {name} has no features at that stride; it has some at {there}")
    return cuts[-1]


def _stride(image_size: int, size: int) -> float:
    """Return the pixels for each position of a map; layers round odd sizes up or down.

    Examples
    --------
    >>> _stride(28, 4), _stride(28, 7), _stride(32, 11)
    (8, 4, 2.909090909090909)
    """
    # Regions are pooled at powers of two alone.
    power = 2 ** round(math.log2(image_size / size))
    return power if size in (image_size // power, -(-image_size // power)) else image_size / size


def _of_one_size(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes that pool to a stated size, and those that follow from these alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        pools = isinstance(modules.get(str(node.target)), _TO_ONE_SIZE) or node.target is F.adaptive_avg_pool2d
        inputs = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
        if pools or (inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _is_map(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4


def _separates(nodes: Sequence[fx.Node], cut: fx.Node, end: fx.Node) -> bool:
    """Tell whether all that comes after a node, up to the end, reads the network's input through it alone."""
    position = {node: index for index, node in enumerate(nodes)}
    after = nodes[position[cut] + 1 : position[end] + 1]
    return all(
        operand.op == "get_attr" or position[operand] >= position[cut]
        for node in after
        for operand in node.all_input_nodes
    )


def _last_of(nodes: Sequence[fx.Node], module: str, option: str, name: str) -> fx.Node:
    """Return the last operation inside a module."""

    def inside(node: fx.Node) -> bool:
        stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        names = [*stack, str(node.target)] if node.op == "call_module" else stack
        return any(found == module or found.startswith(f"{module}.") for found in names)

    found = [node for node in nodes if inside(node)]
    if not found:
        raise UserError(f"{option}={module}: {name} has no such module")
    return found[-1]


def _after_pooling(cut: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the node whose value the head takes: past a pooling that follows the body."""
    users = list(cut.users)
    if len(users) == 1 and users[0].op == "call_module" and isinstance(modules.get(str(users[0].target)), _POOLING):
        return users[0]
    return cut


def _part(graph: fx.Graph, nodes: Sequence[fx.Node], start: fx.Node | None, end: fx.Node) -> fx.Graph:
    """Return the operations from a node's value, or from the network's input, to a node."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copies[start] = part.placeholder("features")
    needed = _needed(end, start)
    for node in nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, lambda operand: copies[operand])
    part.output(copies[end])
    return part


def _needed(end: fx.Node, start: fx.Node | None) -> set[fx.Node]:
    """Return the nodes that a node follows from, back to another one."""
    found: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node is start else node.all_input_nodes
    return found


def _head_features(head: nn.Module, shape: tuple[int, int, int]) -> int:
    try:
        with torch.no_grad():
            found: torch.Tensor = on_meta(head).eval()(torch.zeros(1, *shape, device="meta"))
    except Exception as error:
        size = " x ".join(map(str, shape[1:]))
        raise UserError(
            f"transfer.head: what follows the body does not take regions of {size}; take transfer.head={POOL}, or name "
            "the module with which it should end"
        ) from error
    return found.shape[1]


def _first_reader(head: fx.Graph, modules: Mapping[str, nn.Module]) -> str | None:
    for name in module_calls(head):
        if isinstance(modules.get(name), nn.Conv2d | nn.Linear):
            return name
    return None
