"""Cutting a network to the channels a plan keeps, and rebuilding the result from data.

`apply` gives the pruned network with inherited weights and its `Architecture`; `reshape` gives a freshly
built network the same shapes, so that ``load_state_dict`` fits: there is no pickle, and no network definition
with a list of widths.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from rethink_prune.copying import copy_network
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import (
    INPUT_WIDTHS,
    OUTPUT_WIDTHS,
    SELECTED,
    Architecture,
    select_inputs,
    selects,
)
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channels import CutPlan
from rethink_prune.surgery.graph import describe_call, infer_values, run_graph, trace

_Kept = Mapping[str, Iterable[int]]


def apply(model: nn.Module, plan: CutPlan) -> tuple[nn.Module, Architecture]:
    """Return a copy of `model` without the channels that `plan` drops, and its architecture.

    Parameters
    ----------
    model : nn.Module
        The network the plan was made for. Stays as it is.
    plan : CutPlan
        From `Channels.plan`.

    Returns
    -------
    pruned : nn.Module
        Keeps class, state-dict keys, mode, dtypes, devices and ``requires_grad``. Where a constant in the
        forward pass had to change (``x[:, :8]``), its class is derived
        from the network's.
        Its parameters are new: build the optimiser afterwards.
    architecture : Architecture

    Raises
    ------
    UserError
        If the pruned network would not run, or not run the same operations.

    Examples
    --------
    >>> from rethink_prune.surgery.channels import analyse
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> channels = analyse(model, torch.zeros(1, 3, 8, 8))
    >>> pruned, architecture = apply(model, channels.plan({"0": [1, 3]}))
    >>> pruned[2]
    Conv2d(2, 2, kernel_size=(3, 3), stride=(1, 1))
    >>> architecture.modules
    {'0': {'out_channels': 2}, '2': {'in_channels': 2}}
    """
    selections = {name: torch.tensor(indexes) for name, indexes in plan.selections.items()}
    outputs, inputs = (
        {name: torch.tensor(kept) for name, kept in table.items()} for table in (plan.outputs, plan.inputs)
    )
    architecture = Architecture(dict(plan.attributes), plan.edits, selections, outputs=outputs, inputs=inputs)
    pruned = _cut(model, plan.outputs, plan.inputs, architecture)
    shapes = on_meta(pruned).eval()
    graph = _edit_graph(shapes, plan.edits)
    # A forward pass may compute with a width (x * self.conv.out_channels), which no trace of the full network shows.
    _check_operations(graph, shapes, plan, model)
    return run_graph(pruned, graph, shapes) if plan.edits else pruned, architecture


def reshape(model: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a copy of a freshly built network with the shapes of a pruned one.

    Parameters
    ----------
    model : nn.Module
        The network at full width, as its factory builds it. Stays as it is.
    architecture : Architecture
        From `apply` or `Architecture.load`.

    Returns
    -------
    nn.Module
        Takes the pruned network's state dict. Its weights are those of `model` at the architecture's positions, if it
        has them, and otherwise arbitrary pieces. Masks are not applied.

    Raises
    ------
    UserError
        If the architecture is not one of this network.

    Examples
    --------
    >>> architecture = Architecture({"0": {"out_features": 2}, "1": {"in_features": 2}})
    >>> reshape(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)), architecture)
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    architecture.check_fits(model)
    widths = [(name, *item) for name, attributes in architecture.modules.items() for item in attributes.items()]
    outputs: _Kept = {name: range(value) for name, key, value in widths if key in OUTPUT_WIDTHS}
    # A grouped convolution's weight has as many columns as before: those of one group.
    grouped = {name for name in architecture.modules if getattr(model.get_submodule(name), "groups", 1) > 1}
    inputs: _Kept = {name: range(value) for name, key, value in widths if key in INPUT_WIDTHS and name not in grouped}
    if architecture.outputs or architecture.inputs:
        outputs, inputs = (
            {name: kept.tolist() for name, kept in table.items()}
            for table in (architecture.outputs, architecture.inputs)
        )
    reshaped = _cut(model, outputs, inputs, architecture)
    if architecture.edits:
        shapes = on_meta(reshaped).eval()
        reshaped = run_graph(reshaped, _edit_graph(shapes, architecture.edits), shapes)
    return remove_branches(reshaped, architecture.removed) if architecture.removed else reshaped


def _cut(model: nn.Module, outputs: _Kept, inputs: _Kept, architecture: Architecture) -> nn.Module:
    """Return a copy of `model` with these rows and columns of its tensors, attributes and selections."""
    # The copy takes from `memo` what is already copied. With the cut tensors there, the full ones are never
    # copied, and a tensor with two owners stays one tensor.
    memo: dict[int, Any] = {}
    for name in outputs.keys() | inputs.keys():
        module = model.get_submodule(name)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            # A batch norm's step count; what is set below.
            if tensor.ndim == 0 or (key == SELECTED and selects(module)):
                continue
            cut = tensor.detach()
            for dim, kept in enumerate((outputs.get(name), inputs.get(name) if key == "weight" else None)):
                if kept is not None:
                    cut = cut.index_select(dim, torch.tensor(list(kept), device=tensor.device))
            # index_select returns a contiguous tensor; channels_last would be lost.
            if tensor.ndim == 4 and not tensor.is_contiguous():
                cut = cut.contiguous(memory_format=torch.channels_last)
            # A parameter cannot change its shape in place, so these are new: an optimiser built before the cut
            # would go on with the old ones.
            if isinstance(tensor, nn.Parameter):
                cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = cut
    result = copy_network(model, memo)
    for name, values in architecture.modules.items():
        for attribute, value in values.items():
            # JSON has lists for tuples; torch wants a tuple for a padding.
            setattr(result.get_submodule(name), attribute, tuple(value) if isinstance(value, list) else value)
    for name, indexes in architecture.selections.items():
        module = result.get_submodule(name)
        device = next((tensor.device for tensor in module.parameters()), None)
        select_inputs(module, indexes.to(device))
    return result


def _edit_graph(shapes: nn.Module, edits: Mapping[str, Mapping[str, Any]]) -> fx.Graph:
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
    >>> graph = _edit_graph(Halves(), {"narrow": {"kind": "narrow", "position": 0, "counts": [0, 3]}})
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


def _check_operations(graph: fx.Graph, shapes: nn.Module, plan: CutPlan, model: nn.Module) -> None:
    """Run the pruned network on shapes alone and compare every operation with what the plan expects.

    Parameters
    ----------
    graph : fx.Graph
        A trace of `shapes`.
    shapes : nn.Module
        The pruned network, `cost.on_meta`.
    plan : CutPlan
    model : nn.Module
        The network that was pruned.

    Raises
    ------
    UserError
        If an operation differs, for example because the forward pass computes with a layer's width.
    """
    values = infer_values(graph, shapes, plan.input_shape)
    seen = {node.name: (node, value) for node, value in values.items() if isinstance(value, torch.Tensor)}
    network = type(shapes).__name__
    calls = {name: call for name, (call, _) in plan.operations.items()}
    if any(describe_call(seen[name][0]) != call for name, call in calls.items() if name in seen):
        # A network that counts its forward passes may compute with another number by now.
        calls |= {node.name: describe_call(node) for node in trace(on_meta(model)).nodes}
    for name, (_, shape) in plan.operations.items():
        call = calls[name]
        node, value = seen.get(name, (None, None))
        label = str(node.target) if node is not None and node.op == "call_module" else name
        if node is None or value is None or tuple(value.shape) != shape:
            found = "is gone" if value is None else f"gives {tuple(value.shape)} instead of {shape}"
            raise UserError(f"{network}: cannot be pruned like this: after surgery {label} {found}")
        if name not in plan.edits and describe_call(node) != call:
            problem = f"{label} depends on the width of a layer: {call} became {describe_call(node)}"
            raise UserError(f"{network}: cannot be pruned: {problem}")
