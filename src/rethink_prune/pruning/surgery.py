"""Cutting a network to the channels a plan keeps, and rebuilding the result from data.

`apply` gives the pruned network with inherited weights and its `Architecture`; `reshape` gives a freshly
built network the same shapes, so that ``load_state_dict`` fits: there is no pickle, and no network definition
with a list of widths.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx, nn

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.channels import Channels, Plan
from rethink_prune.pruning.graph import ChannelSelection, describe_call, evaluate, trace

__all__ = ["Architecture", "ChannelSelection", "apply", "mask", "reshape"]

_FORMAT = "rethink-prune architecture 1"
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
        The indexes of each changed channel selection, int64.
    """

    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    selections: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``architecture.json``, and ``architecture.safetensors`` if it has tensors, into `folder`."""
        content = {
            "format": _FORMAT,
            "modules": self.modules,
            "edits": self.edits,
            "selections": sorted(self.selections),
        }
        text = json.dumps(content, sort_keys=True, indent=1)
        (folder / "architecture.json").write_text(text + "\n", encoding="utf-8")
        if self.selections:
            tensors = {f"selections/{name}": tensor.contiguous() for name, tensor in self.selections.items()}
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
            tensors = load_file(folder / "architecture.safetensors") if content["selections"] else {}
            selections = {name: tensors[f"selections/{name}"] for name in content["selections"]}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error!r}") from error
        return cls(modules, edits, selections)


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
    pruned = _cut(model, plan.outputs, plan.inputs, plan.attributes)
    shapes = on_meta(pruned).eval()
    graph = _edited_graph(shapes, plan.edits)
    _check(graph, shapes, plan)
    if plan.edits:
        pruned = _with_graph(pruned, graph, shapes)
    selections = {
        name: module.indexes.detach().clone()
        for name, module in pruned.named_modules()
        if isinstance(module, ChannelSelection) and name in plan.outputs
    }
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
    for name, indexes in architecture.selections.items():
        if not isinstance(modules.get(name), ChannelSelection):
            raise UserError(f"{type(model).__name__}: has no channel selection {name}")
        outputs[name] = range(len(indexes))
    reshaped = _cut(model, outputs, inputs, architecture.modules)
    for name, indexes in architecture.selections.items():
        reshaped.get_buffer(f"{name}.indexes").copy_(indexes)
    if not architecture.edits:
        return reshaped
    shapes = on_meta(reshaped).eval()
    return _with_graph(reshaped, _edited_graph(shapes, architecture.edits), shapes)


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
            if isinstance(module, ChannelSelection):
                # It has no weights; what it selects is zeroed where it is read.
                for reader in channels.consumers(name):
                    if reader in plan.inputs:
                        weight = masked.get_parameter(f"{reader}.weight")
                        weight[:, _others(plan.inputs[reader], weight.shape[1])] = 0
                continue
            tensors = [t for t in (module.weight, getattr(module, "bias", None)) if isinstance(t, torch.Tensor)]
            # A norm without scale and shift gives zero for a zero channel only if its mean is zero.
            tensors = tensors or [t for t in (module.running_mean,) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                tensor[_others(kept, len(tensor))] = 0
    return masked


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
            if tensor.ndim == 0:  # a batch norm's step count
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
