"""Edited graphs: new numbers for constants that count channels, and a network that runs a changed graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from rethink_prune.errors import UserError
from rethink_prune.surgery.graph import trace


def edit_graph(shapes: nn.Module, edits: Mapping[str, Mapping[str, Any]]) -> fx.Graph:
    """Return the trace of a network with constants rewritten.

    Parameters
    ----------
    shapes : nn.Module
        A copy `cost.on_meta`, in evaluation mode.
    edits : mapping of str to mapping
        For a graph node's name:

        ``kind`` : {"slice", "narrow", "split", "pad", "size"}
            The operation: an index with a slice, ``narrow``, ``split`` or ``chunk``, ``pad``, ``view`` and its like.
        ``position`` : int
            Where the numbers stand in the index, padding or size.
        ``counts`` : list of int
            Channels before and inside the slice; of each part; before and after a padded stream; of the result.

    Raises
    ------
    UserError
        If the graph has no such node, or if the kind is not known.

    Examples
    --------
    >>> class Halves(nn.Module):
    ...     def forward(self, x):
    ...         return x.narrow(1, 0, 4)
    >>> graph = edit_graph(Halves(), {"narrow": {"kind": "narrow", "position": 0, "counts": [0, 3]}})
    >>> [node.args for node in graph.nodes if node.name == "narrow"]
    [(x, 1, 0, 3)]
    """
    graph = trace(shapes)
    nodes = {node.name: node for node in graph.nodes}
    for name, edit in edits.items():
        if name not in nodes:
            raise UserError(f"{type(shapes).__name__}: its graph has no {name}, which the architecture changes")
        _write_counts(nodes[name], edit["kind"], edit["position"], list(edit["counts"]))
    return graph


def _write_counts(node: fx.Node, kind: str, position: int, counts: list[int]) -> None:
    """Write new channel counts into the arguments of a graph node."""
    options: dict[str, Any] = {}
    arguments: tuple[Any, ...]
    match kind:
        case "slice":
            index = node.args[1]
            items: list[Any] = list(index) if isinstance(index, tuple | list) else [index]
            items[position] = slice(counts[0], counts[0] + counts[1])
            arguments = (tuple(items),)
        case "narrow":
            arguments = (node.args[1] if len(node.args) > 1 else node.kwargs["dim"], *counts)
        case "split":
            # chunk divides evenly; the parts need not remain equal.
            node.target = "split" if node.op == "call_method" else torch.split
            arguments = (counts, node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))
        case "pad":
            padding: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            arguments = ([*padding[:position], *counts, *padding[position + 2 :]], *node.args[2:])
            options = {name: value for name, value in node.kwargs.items() if name != "pad"}
        case "size":
            # view(2, -1), view((2, -1)), reshape(x, shape=(2, -1))
            sizes: Any = node.args[1:] or tuple(node.kwargs.values())
            sizes = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
            arguments = ((*sizes[:position], counts[0], *sizes[position + 1 :]),)
        case _:
            raise UserError(f"{node.name}: unknown kind of edit {kind!r}")
    node.args, node.kwargs = (node.args[0], *arguments), options


def run_graph(model: nn.Module, graph: fx.Graph, traced: nn.Module) -> fx.GraphModule:
    """Return a graph module around the modules of `model`, which must not be used any more.

    Parameters
    ----------
    model : nn.Module
        The network with its weights.
    graph : fx.Graph
        A changed trace of `traced`.
    traced : nn.Module
        The copy of `model` that was traced.
    """
    for node in graph.nodes:
        if node.op == "get_attr" and hasattr(traced, node.target) and not hasattr(model, node.target):
            # A tensor that the forward pass creates; the tracer put it into the module it traced.
            model.register_buffer(node.target, getattr(traced, node.target), persistent=False)
    result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    # It holds what its graph uses, in plain containers. With the network's own tables instead, the keys of
    # the state dict, their order and unused parts (auxiliary heads) remain.
    for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(result, table, getattr(model, table))
    result.training = model.training
    return result
