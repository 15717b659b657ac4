"""Cutting a network to the channels a plan keeps, and rebuilding the result from data.

`apply` gives the pruned network with inherited weights and its `Architecture`; `reshape` gives a freshly
built network the same shapes, so that ``load_state_dict`` fits: there is no pickle, and no network definition
with a list of widths.
"""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.channels import Channels, Plan
from rethink_prune.surgery.graph import describe_call, evaluate, select_inputs, trace
from rethink_prune.surgery.rules import operation_name

__all__ = ["Architecture", "apply", "mask", "remove_branches", "reshape"]

_FORMAT = "rethink-prune architecture 2"
# The attributes a file may set, by what they count.
_OUTPUT_WIDTHS = ("out_channels", "out_features", "num_features", "num_parameters")
_INPUT_WIDTHS = ("in_channels", "in_features")
_ATTRIBUTES = (*_OUTPUT_WIDTHS, *_INPUT_WIDTHS, "groups", "padding")


@dataclass(frozen=True)
class Architecture:
    """What is left of a network, relative to the network as its factory builds it. Empty: nothing is gone.

    Attributes
    ----------
    modules : mapping of str to mapping of str to value
        New attribute values of each changed module: ``{"conv1": {"out_channels": 14}, ...}``.
    edits : mapping of str to mapping
        New numbers for constants in the traced graph, by node name; see `rewrite`.
    selections : mapping of str to torch.Tensor
        For batch norms, convolutions and linear layers that read a stream which stays whole: the indexes of the
        channels they read, int64.
    removed : tuple of str
        Last modules of the residual branches that are gone; see `remove_branches`.
    masks : mapping of str to torch.Tensor
        For parameters of which single weights are gone: True where a weight remains, in the parameter's shape.
    """

    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    selections: Mapping[str, torch.Tensor] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``architecture.json``, and ``architecture.safetensors`` if it has tensors, into `folder`."""
        content = {
            "format": _FORMAT,
            "modules": self.modules,
            "edits": self.edits,
            "selections": sorted(self.selections),
            "removed": list(self.removed),
            "masks": sorted(self.masks),
        }
        text = json.dumps(content, sort_keys=True, indent=1)
        (folder / "architecture.json").write_text(text + "\n", encoding="utf-8")
        tensors = {f"selections/{name}": tensor.cpu().contiguous() for name, tensor in self.selections.items()}
        tensors |= {f"masks/{name}": tensor.cpu().contiguous() for name, tensor in self.masks.items()}
        if tensors:
            save_file(tensors, folder / "architecture.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Architecture:
        """Read what `save` wrote.

        Raises
        ------
        UserError
            If a file is missing, damaged, or of another format.
        """
        path = folder / "architecture.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise UserError(f"{path}: not a file of the format {_FORMAT!r}")
            modules, edits = _tables(content["modules"]), _tables(content["edits"])
            names = content["selections"], content["masks"]
            tensors = load_file(folder / "architecture.safetensors") if any(names) else {}
            selections = {name: tensors[f"selections/{name}"] for name in content["selections"]}
            masks = {name: tensors[f"masks/{name}"] for name in content["masks"]}
            removed = tuple(map(str, content["removed"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error!r}") from error
        return cls(modules, edits, selections, removed, masks)


def apply(model: nn.Module, plan: Plan) -> tuple[nn.Module, Architecture]:
    """Return a copy of `model` without the channels that `plan` drops, and its architecture.

    Parameters
    ----------
    model : nn.Module
        The network the plan was made for. Stays as it is.
    plan : Plan
        From `Channels.plan`.

    Returns
    -------
    pruned : nn.Module
        Keeps class, state-dict keys, mode, dtypes, devices and ``requires_grad``. Where a constant in the
        forward pass had to change (``x[:, :8]``), it is an ``fx.GraphModule`` with the same modules inside.
        Its parameters are new: build the optimiser afterwards.
    architecture : Architecture

    Raises
    ------
    UserError
        If the pruned network would not run, or not run the same operations.
    """
    pruned = _cut(model, plan.outputs, plan.inputs, plan.selections, plan.attributes)
    shapes = on_meta(pruned).eval()
    graph = _edited_graph(shapes, plan.edits)
    _check(graph, shapes, plan)
    if plan.edits:
        pruned = _with_graph(pruned, graph, shapes)
    selections = {name: torch.tensor(indexes) for name, indexes in plan.selections.items()}
    return pruned, Architecture(plan.attributes, plan.edits, selections)


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
        Takes the pruned network's state dict. Its weights are arbitrary pieces of the full network's: load or
        initialise them.

    Raises
    ------
    UserError
        If the architecture is not one of this network.
    """
    modules = dict(model.named_modules())
    outputs: dict[str, Iterable[int]] = {}
    inputs: dict[str, Iterable[int]] = {}
    for name, attributes in architecture.modules.items():
        for attribute, value in attributes.items():
            full = getattr(modules.get(name), attribute, None)
            if attribute not in _ATTRIBUTES or full is None:
                raise UserError(f"{type(model).__name__}: has no {name}.{attribute}, which the architecture changes")
            if attribute != "padding" and not (isinstance(value, int) and 1 <= value <= full):
                raise UserError(f"{name}.{attribute}={value}: must be between 1 and {full}, its full width")
            if attribute in _OUTPUT_WIDTHS:
                outputs[name] = range(value)
            elif attribute in _INPUT_WIDTHS and getattr(modules[name], "groups", 1) == 1:
                inputs[name] = range(value)
    unknown = [name for name in (*architecture.selections, *architecture.removed) if name not in modules]
    unknown += [name for name in architecture.masks if name not in dict(model.named_parameters())]
    if unknown:
        raise UserError(f"{type(model).__name__}: has no {unknown[0]}, which the architecture changes")
    reshaped = _cut(model, outputs, inputs, architecture.selections, architecture.modules)
    if architecture.edits:
        shapes = on_meta(reshaped).eval()
        reshaped = _with_graph(reshaped, _edited_graph(shapes, architecture.edits), shapes)
    return remove_branches(reshaped, architecture.removed) if architecture.removed else reshaped


def mask(model: nn.Module, channels: Channels, drop: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of `model` at full width in which the dropped channels are zero wherever they appear.

    In evaluation mode it computes what the pruned network computes: the definition of pruning a channel, and
    the reference that tests compare surgery with.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    channels : Channels
        The analysis of `model`.
    drop : mapping of str to iterable of int
        Group name to indexes into its units.
    """
    masked = copy.deepcopy(model)
    plan = channels.plan(drop)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for name, kept in plan.outputs.items():
            module = modules[name]
            tensors = [t for t in (module.weight, getattr(module, "bias", None)) if isinstance(t, torch.Tensor)]
            # A norm without scale and shift gives zero for a zero channel only if its mean is zero.
            tensors = tensors or [t for t in (module.running_mean,) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                tensor[_others(kept, len(tensor))] = 0
        for name in plan.selections.keys() & plan.inputs.keys():
            # Others read the whole stream; this layer's weights for what it does not select are zero.
            weight = modules[name].get_parameter("weight")
            weight[:, _others(plan.inputs[name], weight.shape[1])] = 0
    return masked


def remove_branches(model: nn.Module, ends: Sequence[str]) -> nn.Module:
    """Return a copy of a residual network without some branches: what was added to them remains.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    ends : sequence of str
        The last module of each branch: what it returns reaches an addition; see `branch_addition`.

    Returns
    -------
    fx.GraphModule
        Without the modules and parameters that only these branches used; the state-dict keys of the others stay.

    Raises
    ------
    UserError
        If a module ends no branch, if a branch cannot go without changing what remains, or if training and evaluation
        mode run different operations.
    """
    model = copy.deepcopy(model)
    shapes = on_meta(model)
    graph, training_graph = trace(on_meta(model)), trace(shapes, training=True)
    if [describe_call(node) for node in graph.nodes] != [describe_call(node) for node in training_graph.nodes]:
        raise UserError(
            f"{type(model).__name__}: no block can be removed: training and evaluation mode run different operations"
        )
    graph, modules = training_graph, dict(shapes.named_modules())
    additions: dict[fx.Node, tuple[str, fx.Node]] = {}
    for end in ends:
        addition, other = branch_addition(graph, shapes, end)
        if addition in additions:
            raise UserError(
                f"{type(model).__name__}: {additions[addition][0]} and {end} end in one addition; one has to remain"
            )
        additions[addition] = end, other
    called = _names(graph)
    # The last one first: what remains of it may be the sum that an earlier one ends in.
    for addition in [node for node in reversed(graph.nodes) if node in additions]:
        if not addition.users:
            continue  # it ran inside a branch that is gone by now
        end, other = additions[addition]
        (branch,) = (operand for operand in addition.all_input_nodes if operand is not other)
        remaining = other
        if not all(_makes_new_tensor(user, modules) for user in addition.users):
            # The sum was a tensor of its own; a reader that overwrites it (in-place ReLU) must not reach the shortcut.
            with graph.inserting_before(addition):
                remaining = graph.call_method("clone", (other,))
        addition.replace_all_uses_with(remaining)
        graph.erase_node(addition)
        for node in _erase_unused(graph, branch, modules):
            raise UserError(
                f"{type(model).__name__}: {end}: its branch cannot be removed, because it overwrites {node.name}, "
                "which others read"
            )
    result = _with_graph(model, graph, shapes)
    for name in sorted(called - _names(graph), reverse=True):  # what a module holds before the module
        owner, _, attribute = name.rpartition(".")
        if hasattr(result.get_submodule(owner), attribute):  # not so for constants that only the tracer knows
            delattr(result.get_submodule(owner), attribute)
    return result


def branch_addition(graph: fx.Graph, model: nn.Module, end: str) -> tuple[fx.Node, fx.Node]:
    """Return the addition that a residual branch ends in, and its other operand.

    Parameters
    ----------
    graph : fx.Graph
        A trace of `model`.
    model : nn.Module
    end : str
        Name of the branch's last module.

    Raises
    ------
    UserError
        If what the module returns does not reach an addition of two tensors through operations on it alone.
    """
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == end]
    problem = f"{type(model).__name__}: {end} does not end a residual branch"
    if len(nodes) != 1:
        raise UserError(f"{problem}: it is called {len(nodes)} times")
    node = nodes[0]
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise UserError(f"{problem}: its result has {len(users)} readers")
        before, node = node, users[0]
        if is_addition(node):
            (other,) = (operand for operand in node.all_input_nodes if operand is not before)
            return node, other
        if len(node.all_input_nodes) != 1 or node.op == "output":
            raise UserError(f"{problem}: it is read by {node.name}")


def is_addition(node: fx.Node) -> bool:
    """Tell whether a node is the plain sum of two values (``alpha`` of ``torch.add`` would scale one of them)."""
    if node.op not in ("call_function", "call_method") or "alpha" in node.kwargs:
        return False
    return operation_name(node) == "add" and len(node.all_input_nodes) == 2


def rewrite(node: fx.Node, kind: str, position: int, counts: list[int]) -> None:
    """Write new channel counts into the arguments of a graph node.

    Parameters
    ----------
    node : fx.Node
        A call of an operation with constants that count channels.
    kind : {"slice", "narrow", "split", "pad", "size"}
        The operation: an index with a slice, ``narrow``, ``split`` or ``chunk``, ``pad``, ``view`` and its
        like.
    position : int
        Where the numbers stand in the index, padding or size.
    counts : list of int
        Channels before and inside the slice; of each part; before and after a padded stream; of the result.
    """
    match kind:
        case "slice":
            index = node.args[1]
            items: list[Any] = list(index) if isinstance(index, tuple | list) else [index]
            items[position] = slice(counts[0], counts[0] + counts[1])
            node.update_arg(1, tuple(items))
        case "narrow":
            dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            node.args, node.kwargs = (node.args[0], dim, *counts), {}
        case "split":
            dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
            node.args, node.kwargs = (node.args[0], counts, dim), {}
            # chunk divides evenly; the parts need not remain equal.
            node.target = "split" if node.op == "call_method" else torch.split
        case "pad":
            padding: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            padding = [*padding[:position], *counts, *padding[position + 2 :]]
            if len(node.args) > 1:
                node.update_arg(1, padding)
            else:
                node.update_kwarg("pad", padding)
        case "size":
            key = next((key for key in ("shape", "size") if key in node.kwargs), None)
            sizes: Any = node.args[1:] if key is None else node.kwargs[key]
            if key is None and len(sizes) == 1 and isinstance(sizes[0], tuple | list):
                sizes = sizes[0]
            sizes = tuple(counts[0] if i == position else size for i, size in enumerate(sizes))
            if key is None:
                node.args = (node.args[0], sizes)
            else:
                node.update_kwarg(key, sizes)
        case _:
            raise UserError(f"{node.name}: unknown kind of edit {kind!r}")


def _cut(
    model: nn.Module,
    outputs: Mapping[str, Iterable[int]],
    inputs: Mapping[str, Iterable[int]],
    selections: Mapping[str, Sequence[int] | torch.Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
) -> nn.Module:
    """Return a copy of `model` with these rows and columns of its tensors, and with these attributes."""
    # deepcopy takes from `memo` what is already copied. With the cut tensors there, the full ones are never
    # copied, and a tensor with two owners stays one tensor.
    memo: dict[int, Any] = {}
    for name in outputs.keys() | inputs.keys():
        module = model.get_submodule(name)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in tensors:
            if tensor.ndim == 0 or key == "selected":  # a batch norm's step count; set below
                continue
            cut = tensor.detach()
            if name in outputs:
                cut = cut.index_select(0, torch.tensor(list(outputs[name]), device=tensor.device))
            if name in inputs and key == "weight":
                cut = cut.index_select(1, torch.tensor(list(inputs[name]), device=tensor.device))
            if tensor.ndim == 4 and not tensor.is_contiguous():
                cut = cut.contiguous(memory_format=torch.channels_last)
            if isinstance(tensor, nn.Parameter):
                cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = cut
    result = copy.deepcopy(model, memo)
    for name, values in attributes.items():
        for attribute, value in values.items():
            setattr(result.get_submodule(name), attribute, tuple(value) if isinstance(value, list) else value)
    for name, indexes in selections.items():
        module = result.get_submodule(name)
        device = next((tensor.device for tensor in module.parameters()), None)
        select_inputs(module, torch.as_tensor(indexes).to(device))
    return result


def _edited_graph(shapes: nn.Module, edits: Mapping[str, Mapping[str, Any]]) -> fx.Graph:
    """Return the trace of a copy on meta, with constants rewritten."""
    graph = trace(shapes)
    nodes = {node.name: node for node in graph.nodes}
    for name, edit in edits.items():
        if name not in nodes:
            raise UserError(f"{type(shapes).__name__}: its graph has no {name}, which the architecture changes")
        rewrite(nodes[name], edit["kind"], edit["position"], list(edit["counts"]))
    return graph


def _with_graph(model: nn.Module, graph: fx.Graph, traced: nn.Module) -> fx.GraphModule:
    """Return a graph module around the modules of `model`, which must not be used any more."""
    persistent = model.state_dict().keys()
    for node in graph.nodes:
        if node.op == "get_attr" and hasattr(traced, node.target) and not hasattr(model, node.target):
            # A tensor that the forward pass creates; the tracer put it into the module it traced.
            model.register_buffer(node.target, getattr(traced, node.target))
    result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    # It holds what its graph uses, in plain containers. With the network's own modules instead, the keys of
    # the state dict, their order and unused parts (auxiliary heads) remain.
    for name, _ in list(result.named_children()):
        delattr(result, name)
    for name, module in model.named_children():
        result.add_module(name, module)
    for name, parameter in model.named_parameters(recurse=False):
        result.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        result.register_buffer(name, buffer, persistent=name in persistent)
    result.training = model.training
    return result


def _names(graph: fx.Graph) -> set[str]:
    """Return the names of the modules and tensors that a graph uses."""
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def _makes_new_tensor(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node surely leaves its operands alone, and returns no view of them."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (_ConvNd, _BatchNorm, nn.Linear))
    return node.op == "call_function" and node.target in (operator.add, torch.add)


def _erase_unused(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Erase a node nobody reads and all that ran for it alone; return what remains but was overwritten by these."""
    erased: dict[fx.Node, None] = {}
    overwritten: list[fx.Node] = []
    pending = [node]
    while pending:
        node = pending.pop()
        if node.users or node.op == "placeholder" or node in erased:
            continue
        operands = node.all_input_nodes
        if _overwrites(node, modules):
            overwritten += operands[:1]
        graph.erase_node(node)
        erased[node] = None
        pending += operands
    return [node for node in overwritten if node not in erased]


def _overwrites(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node writes its result into its first operand."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv") or bool(node.kwargs.get("inplace"))


def _check(graph: fx.Graph, shapes: nn.Module, plan: Plan) -> None:
    """Run the pruned network on shapes alone and compare every operation with what the plan expects.

    Raises
    ------
    UserError
        If an operation differs, for example because the forward pass computes with a layer's width.
    """
    values = evaluate(graph, shapes, plan.input_shape)
    seen = {node.name: (node, value) for node, value in values.items() if isinstance(value, torch.Tensor)}
    for name, shape in plan.shapes.items():
        node, value = seen.get(name, (None, None))
        label = str(node.target) if node is not None and node.op == "call_module" else name
        if node is None or value is None or tuple(value.shape) != shape:
            found = "is gone" if value is None else f"gives {tuple(value.shape)} instead of {shape}"
            raise UserError(f"{type(shapes).__name__}: cannot be pruned like this: after surgery {label} {found}")
        if name not in plan.edits and describe_call(node) != plan.calls[name]:
            raise UserError(
                f"{type(shapes).__name__}: cannot be pruned: {label} depends on the width of a layer: "
                f"{plan.calls[name]} became {describe_call(node)}"
            )


def _others(kept: Iterable[int], size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept))


def _tables(content: Any) -> dict[str, dict[str, Any]]:
    """Check that a part of the file is a table of tables."""
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError("modules and edits must be tables")
    return content
