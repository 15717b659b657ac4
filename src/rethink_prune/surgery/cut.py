"""Cutting a network to the channels a plan keeps, and rebuilding the result from data.

`apply` gives the pruned network with inherited weights and its `Architecture`; `reshape` gives a freshly
built network the same shapes, so that ``load_state_dict`` fits: there is no pickle, and no network definition
with a list of widths.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
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
    named_tensors,
    select_inputs,
    selects,
    width,
)
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channel_ids import TRAINING
from rethink_prune.surgery.channels import CutPlan
from rethink_prune.surgery.exported import Graphs, trace_modes
from rethink_prune.surgery.graph import describe_call, infer_values, keep_constants, operation_name, run_graph, trace

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
    sizes = {name: {str(dim): len(kept) for dim, kept in dims.items()} for name, dims in plan.parameters.items()}
    outputs |= {
        f"{name}/{dim}": torch.tensor(kept) for name, dims in plan.parameters.items() for dim, kept in dims.items()
    }
    exported = plan.input_shape if plan.graphs.exported and (plan.attributes or plan.parameters) else ()
    architecture = Architecture(
        dict(plan.attributes),
        plan.edits,
        selections,
        parameters=sizes,
        exported=exported,
        outputs=outputs,
        inputs=inputs,
    )
    pruned = _cut(model, plan.outputs, plan.inputs, architecture)
    shapes = on_meta(pruned)
    if plan.graphs.exported:
        # It has the widths that the full network computes with, which is right.
        graphs = _edit_graphs(plan.graphs, plan.edits)
        keep_constants(shapes, graphs.network, graphs.evaluation)
    elif plan.edits:
        graphs = _edit_graphs(trace_modes(pruned, plan.input_shape, exported=False), plan.edits)
        shapes = graphs.network
    else:
        graphs = Graphs(trace(shapes), None, shapes, shapes)
    # A forward pass may compute with a width (x * self.conv.out_channels), which no trace of the full network shows.
    _check_operations(graphs.evaluation, shapes.eval(), plan, model)
    return _run_graphs(pruned, graphs) if plan.edits or exported else pruned, architecture


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
    outputs: _Kept = {name: range(width(value)) for name, key, value in widths if key in OUTPUT_WIDTHS}
    # A grouped convolution's weight has as many columns as before: those of one group.
    grouped = {name for name in architecture.modules if getattr(model.get_submodule(name), "groups", 1) > 1}
    inputs: _Kept = {name: range(value) for name, key, value in widths if key in INPUT_WIDTHS and name not in grouped}
    if architecture.outputs or architecture.inputs:
        outputs, inputs = (
            {name: kept.tolist() for name, kept in table.items() if "/" not in name}
            for table in (architecture.outputs, architecture.inputs)
        )
    reshaped = _cut(model, outputs, inputs, architecture)
    if architecture.exported:
        # The code of the pruned network cannot be followed: it computes with the widths of the full one.
        full = trace_modes(model, architecture.exported, exported=True)
        reshaped = _run_graphs(reshaped, _edit_graphs(full, architecture.edits))
    elif architecture.edits:
        traced = trace_modes(reshaped, (), exported=False)
        reshaped = _run_graphs(reshaped, _edit_graphs(traced, architecture.edits))
    return remove_branches(reshaped, architecture.removed) if architecture.removed else reshaped


def _cut(model: nn.Module, outputs: _Kept, inputs: _Kept, architecture: Architecture) -> nn.Module:
    """Return a copy of `model` with these rows and columns of its tensors, attributes and selections."""
    # The copy takes from `memo` what is already copied. With the cut tensors there, the full ones are never
    # copied, and a tensor with two owners stays one tensor.
    memo: dict[int, Any] = {}
    named = named_tensors(model)
    for name, sizes in architecture.parameters.items():
        kept_along = {
            int(dim): architecture.outputs.get(f"{name}/{dim}", torch.arange(size)) for dim, size in sizes.items()
        }
        memo[id(named[name])] = _cut_tensor(named[name], kept_along)
    for name in outputs.keys() | inputs.keys():
        module = model.get_submodule(name)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            # A batch norm's step count; what is set below.
            if tensor.ndim == 0 or (key == SELECTED and selects(module)):
                continue
            kept_along = {
                dim: torch.tensor(list(kept))
                for dim, kept in enumerate((outputs.get(name), inputs.get(name) if key == "weight" else None))
                if kept is not None
            }
            memo[id(tensor)] = _cut_tensor(tensor, kept_along)
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


def _cut_tensor(tensor: torch.Tensor, kept_along: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return these positions along some dimensions of a tensor; a parameter if it is one."""
    cut = tensor.detach()
    for dim, kept in kept_along.items():
        cut = cut.index_select(dim, kept.to(tensor.device))
    # index_select returns a contiguous tensor; channels_last would be lost.
    if tensor.ndim == 4 and not tensor.is_contiguous():
        cut = cut.contiguous(memory_format=torch.channels_last)
    # A parameter cannot change its shape in place, so these are new: an optimiser built before the cut
    # would go on with the old ones.
    return nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _run_graphs(model: nn.Module, graphs: Graphs) -> nn.Module:
    """Return `model` with edited graphs as its forward pass; changed in place."""
    model = keep_constants(model, graphs.network, graphs.evaluation)
    if not graphs.differ or graphs.training is None:
        return run_graph(model, graphs.evaluation)
    return run_graph(
        keep_constants(model, graphs.training_network, graphs.training), graphs.evaluation, graphs.training
    )


def _edit_graphs(graphs: Graphs, edits: Mapping[str, Mapping[str, Any]]) -> Graphs:
    """Return copies of a network's graphs with constants rewritten; see `_edit_graph`."""
    name, training = type(graphs.network).__name__, graphs.training
    marked = {key.removeprefix(TRAINING): edit for key, edit in edits.items() if key.startswith(TRAINING)}
    evaluated = {key: edit for key, edit in edits.items() if not key.startswith(TRAINING)}
    if training is not None and graphs.differ:
        training = _edit_graph(training, marked, name)
    return replace(graphs, evaluation=_edit_graph(graphs.evaluation, evaluated, name), training=training)


def _edit_graph(full: fx.Graph, edits: Mapping[str, Mapping[str, Any]], network: str) -> fx.Graph:
    """Return a copy of a graph with constants rewritten.

    Parameters
    ----------
    full : fx.Graph
    edits : mapping of str to mapping
        For a graph node's name:

        ``kind`` : {"slice", "narrow", "split", "pad", "size", "infer", "scale", "normalized"}
            The operation: an index with a slice, ``narrow``, ``split`` or ``chunk``, ``pad``, ``view`` and its like, a
            view with a size that the network computes, attention, ``layer_norm``.
        ``position`` : int
            Where the numbers stand in the index, padding or size.
        ``counts`` : list of int
            Channels before and inside the slice; of each part; before and after a padded stream; of the result. The
            width of unpruned heads, for attention.
    network : str
        Its name, for messages.

    Raises
    ------
    UserError
        If the graph has no such node, or if the kind is not known.

    Examples
    --------
    >>> class Halves(nn.Module):
    ...     def forward(self, x):
    ...         return x.narrow(1, 0, 4)
    >>> edits = {"narrow": {"kind": "narrow", "position": 0, "counts": [0, 3]}}
    >>> graph = _edit_graph(trace(Halves()), edits, "Halves")
    >>> [node.args for node in graph.nodes if node.name == "narrow"]
    [(x, 1, 0, 3)]
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(full, {}))
    nodes = {node.name: node for node in graph.nodes}
    for name, edit in edits.items():
        if name not in nodes:
            raise UserError(f"{network}: its graph has no {name}, which the architecture changes")
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
        case "size" | "infer":
            # view(2, -1), view((2, -1)), reshape(x, shape=(2, -1)), unflatten(x, 1, (2, -1))
            leading = node.args[1:2] if operation_name(node) == "unflatten" else ()
            sizes: Any = node.args[1 + len(leading) :] or tuple(node.kwargs.values())
            sizes = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
            size = counts[0] if kind == "size" else -1
            arguments = (*leading, (*sizes[:position], size, *sizes[position + 1 :]))
        case "scale":
            # The default would be that of the width that is left.
            arguments, options = node.args[1:], {**node.kwargs, "scale": counts[0] ** -0.5}
        case "normalized":
            arguments, options = (counts, *node.args[2:]), dict(node.kwargs)
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
    unedited = {name: call for name, call in calls.items() if name in seen and name not in plan.edits}
    if not plan.graphs.exported and any(describe_call(seen[name][0]) != call for name, call in unedited.items()):
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
