"""Pushing channel ids through a traced network: every node's rule, in the order of execution.

The rules of modules that the trace does not look into are here; those of functions in ``function_rules.py``.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rethink_prune.copying import uncopyable_attributes
from rethink_prune.surgery import attention_rules, function_rules
from rethink_prune.surgery.architecture import read_selected, selection_of, selects
from rethink_prune.surgery.channel_ids import (
    Call,
    ChannelIds,
    ChannelStream,
    Flow,
    FollowedNode,
    Ids,
    NoRule,
    OwnTensor,
)
from rethink_prune.surgery.graph import called_module, describe_call, infer_values, operation_name

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH_NORM_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# A parameter of these is no tensor that nobody owns.
_OWNERS = (*_LAYERS, _BatchNorm, nn.GroupNorm, _InstanceNorm, nn.PReLU)
_NOT_ELEMENTWISE = (nn.Softmax2d, nn.Softmin, nn.GLU, nn.MultiheadAttention)
_RULES: dict[tuple[type[nn.Module], ...], function_rules.Rule] = {
    (nn.GroupNorm, nn.LayerNorm, _InstanceNorm): function_rules.follow_normalisation,
    (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.PReLU): function_rules.follow_unchanged,
    (nn.Flatten,): function_rules.follow_reshape,
    (nn.Softmax, nn.LogSoftmax): attention_rules.follow_softmax,
}
# By the file of torch.nn.modules that defines the class.
_FAMILY_RULES: dict[str, function_rules.Rule] = {
    "activation": function_rules.follow_elementwise,
    "padding": function_rules.follow_padding,
    "pooling": function_rules.follow_pooling,
    "upsampling": function_rules.follow_resampling,
}


def follow_channels(
    graph: fx.Graph, network: nn.Module, ids: ChannelIds, selecting: str | None
) -> dict[str, FollowedNode]:
    """Apply the rule of every node; return the nodes whose result is a tensor.

    Parameters
    ----------
    graph : fx.Graph
        A trace of `network`.
    network : nn.Module
        A copy `cost.on_meta`.
    ids : ChannelIds
        Takes what the rules find out.
    selecting : {"norm", "conv"}, optional
        As for `channels.analyse`.
    """
    values = infer_values(graph, network, ids.input_shape)
    flows: dict[fx.Node, Any] = {}
    nodes: dict[str, FollowedNode] = {}
    for node in graph.nodes:
        module = called_module(node, ids.modules)
        name = operation_name(node) if module is None else type(module).__name__
        flow_args, args = (fx.node.map_arg(node.args, table.__getitem__) for table in (flows, values))
        flow_kwargs, kwargs = (fx.node.map_arg(node.kwargs, table.__getitem__) for table in (flows, values))
        call = Call(node, module, name, flow_args, flow_kwargs, args, kwargs, result=values[node])
        # Without a rule, the result has no channels that can go, which is always right.
        flow: Flow = None
        try:
            if module is not None:
                flow = _follow_module(ids, call, selecting)
            elif node.op == "get_attr":
                flow = _read_parameter(ids, node, call.result)
            elif node.op == "output":
                # Classes, or features that another network reads: their number is not ours to change.
                for stream in call.channel_flows():
                    ids.freeze(stream.ids, "network output")
            elif call.channel_flows() or name == "linear":
                flow = function_rules.function_rule(node)(ids, call)
            elif name in function_rules.RULES_BY_NAME:
                flow = attention_rules.follow_own_tensor(ids, call, function_rules.RULES_BY_NAME[name])
            # A rule may not know every form of its operation; the shapes tell.
            if isinstance(flow, ChannelStream) and len(flow.ids) != call.result.shape[flow.axis]:
                flow = None
                raise NoRule
        except NoRule as refusal:
            reason = str(refusal) or f"unknown form of {call.name}"
            ids.freeze_operands(call, reason)
            if isinstance(module, _LAYERS) and call.label not in ids.outputs:  # listed among those that stay whole
                ids.outputs[call.label] = ids.fresh_frozen(module.weight.shape[0], reason)
        flows[node] = flow
        if isinstance(call.result, torch.Tensor) and node.op != "get_attr":
            followed = flow if isinstance(flow, ChannelStream) else None
            nodes[node.name] = FollowedNode(describe_call(node), tuple(call.result.shape), followed)
    return nodes


def _read_parameter(ids: ChannelIds, node: fx.Node, value: Any) -> Flow:
    """Let channels run along a parameter that no layer owns; a layer's, unless it stands for the layer, stays whole."""
    name = str(node.target)
    if _stands_for_layer(node):
        return OwnTensor(name, tuple(value.shape))
    owner = ids.modules.get(name.rpartition(".")[0])
    if isinstance(owner, nn.Linear) and name.endswith(".bias"):  # it may reach the layer in a changed form
        return OwnTensor(name, tuple(value.shape))
    ids.read_directly.add(name)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or isinstance(owner, _OWNERS):
        return None
    # Masks and the like are buffers of several dimensions.
    known = ids.parameters.get(name, name if value.ndim == 1 else None)
    return None if known is None else OwnTensor(known, tuple(value.shape))


def _stands_for_layer(node: fx.Node) -> bool:
    """Tell whether a parameter is read as weight or bias of a linear function only."""

    def written(user: fx.Node) -> tuple[Any, ...]:
        return (*user.args[1:3], user.kwargs.get("weight"), user.kwargs.get("bias"))

    return all(
        user.op == "call_function" and operation_name(user) == "linear" and node in written(user) for user in node.users
    )


def tie_shared_parameters(ids: ChannelIds) -> None:
    """Tie modules with a parameter in common; freeze modules whose parameter is read outside of them."""
    for name, dims in ids.tensors.items():
        layer, _, key = name.rpartition(".")
        if key == "bias" and isinstance(ids.modules.get(layer), nn.Linear) and layer in ids.outputs:
            ids.tied.append((dims[0], ids.outputs[layer]))
    owners: defaultdict[int, list[tuple[str, str, Any]]] = defaultdict(list)
    tables = (ids.outputs, ids.inputs, ids.features)
    for name, module in ids.modules.items():
        # Layers can share a parameter only if a cut means the same for all of them.
        kind = type(module), getattr(module, "groups", 1), [name in table for table in tables]
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            owners[id(tensor)].append((name, key, kind))
    for places in owners.values():
        first, first_key, _ = places[0]
        alike = all(place[1:] == places[0][1:] for place in places)
        # No cut fits all readers of the tensor.
        stays_whole = not alike or any(f"{name}.{key}" in ids.read_directly for name, key, _ in places)
        reason = "its parameters are read outside of it" if alike else "shares a parameter with another kind"
        for table in tables:
            for name, _, _ in places:
                if stays_whole and name in table:
                    ids.freeze(table[name], f"{name}: {reason}")
                # A bias that is shared does not tie what the layers read.
                elif not stays_whole and first in table and (table is not ids.inputs or first_key == "weight"):
                    ids.tied.append((table[first], table[name]))


def _follow_module(ids: ChannelIds, call: Call, selecting: str | None) -> Flow:
    """Apply the rule of a call's module, which may read a selection of its input; see `channels.analyse`."""
    module: Any = call.module
    if reason := _hidden_behaviour(module):
        raise NoRule(reason)
    if call.channel_flows() and (selects(module) or _may_select(call.node, ids.modules, selecting)):
        call = _read_selection(ids, call, module)
    # Exact classes, and no further parameters: a subclass or a parametrization may compute something else.
    if type(module) in _LAYERS and {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return _follow_layer(ids, call, module)
    if isinstance(module, _BatchNorm):
        return _follow_batch_norm(ids, call, module)
    # A layer is listed among those that stay whole, also where it reads the image.
    if not call.channel_flows() and not isinstance(module, _LAYERS):
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return _pass_by_channel(ids, call, module.num_parameters)
    rule = next((rule for kinds, rule in _RULES.items() if isinstance(module, kinds)), None)
    rule = rule or _FAMILY_RULES.get(type(module).__module__.removeprefix("torch.nn.modules."))
    if rule is None or isinstance(module, _NOT_ELEMENTWISE) or "Unpool" in call.name:
        raise NoRule(f"unknown module {call.name}")
    return rule(ids, call)


def _hidden_behaviour(module: nn.Module) -> str:
    """Return why a module may compute something else than its class does; empty if it does not."""
    before = [hook for hook in module._forward_pre_hooks.values() if hook is not read_selected]
    if before or module._forward_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return "its forward was replaced"
    if shared := uncopyable_attributes(module):
        return f"holds {shared[0]}, which cannot be copied"
    return ""


def _follow_layer(ids: ChannelIds, call: Call, layer: Any) -> ChannelStream:
    """Give a convolution or linear layer fresh outputs; unite the inputs and outputs of each group."""
    name, shape, groups = call.label, layer.weight.shape, getattr(layer, "groups", 1)
    axis = 1 - len(shape)
    # A grouped convolution's weight has the inputs of one group only.
    inputs = _input_ids(ids, call, axis, groups * shape[1])
    if groups == 1 and call.channel_flows():  # with groups, the layer's own zero weights hide its input
        ids.need_zero(call.stream, call)
    outputs = ids.call_layer(name, inputs, shape[0])
    if groups > 1:
        # Torch has no convolution with groups of different sizes, so a group goes as a whole.
        members = np.hstack([inputs.reshape(groups, -1), outputs.reshape(groups, -1)])
        ids.tied.append((np.broadcast_to(members[:, :1], members.shape).ravel(), members.ravel()))
    return ChannelStream(outputs, axis)


def _input_ids(ids: ChannelIds, call: Call, axis: int, count: int) -> Ids:
    """Return the ids along `axis` of a module's input; fresh, frozen ones if no stream runs there."""
    stream = call.flow(0, "input")
    if isinstance(stream, ChannelStream):
        if stream.axis == axis:
            return stream.ids
        ids.freeze(stream.ids, f"{call.label}: runs along another dimension")
    return ids.fresh_frozen(count, f"{call.label}: reads channels that stay whole")


def _read_selection(ids: ChannelIds, call: Call, module: Any) -> Call:
    """Leave a stream whole for its other readers, and let this one read channels with ids of their own."""
    stream = call.stream
    ids.freeze(stream.ids, f"{call.label}: reads a selection of it")
    name = selection_of(call.label)
    if name not in ids.outputs:
        ids.outputs[name] = ids.fresh(len(module.selected) if selects(module) else len(stream.ids))
    return replace(call, flow_args=(ChannelStream(ids.outputs[name], stream.axis), *call.flow_args[1:]))


def _pass_by_channel(ids: ChannelIds, call: Call, count: int) -> ChannelStream | None:
    """Let a stream pass a module that has parameters for each channel."""
    axis = 1 - call.result.ndim
    inputs = _input_ids(ids, call, axis, count)
    ids.tied.append((ids.features.setdefault(call.label, inputs), inputs))
    return call.stream if call.channel_flows() and call.stream.axis == axis else None


def _follow_batch_norm(ids: ChannelIds, call: Call, norm: _BatchNorm) -> Flow:
    stream = _pass_by_channel(ids, call, norm.num_features)
    if stream is None:
        return None
    # A batch norm makes its shift of a zero channel, so a masked channel has scale and shift zero: it is zero then,
    # whatever reaches it. Without scale and shift, only zeros give zero.
    zero = stream.zero or norm.affine
    if type(norm) not in _BATCH_NORMS:
        if {name for name, _ in [*norm.named_parameters(), *norm.named_buffers()]} - _BATCH_NORM_TENSORS:
            raise NoRule(f"{call.name} has tensors of its own")
        if not _keeps_channels_apart(norm, call.result.ndim):
            raise NoRule(f"{call.name} computes a channel from others, or from their number")
        zero = zero and _masked_norm_gives_zero(norm, call.result.ndim)
    return replace(stream, zero=zero)


def _masked_norm_gives_zero(norm: _BatchNorm, ndim: int) -> bool:
    """Try whether a subclass of batch norm, which may end in an activation, gives zero when masked."""
    masked = _with_tensors(norm, lambda t: torch.zeros(t.shape, dtype=t.dtype))
    return not masked(torch.ones(1, norm.num_features, *[1] * (ndim - 2), dtype=_dtype(norm))).any().item()


def _keeps_channels_apart(norm: _BatchNorm, ndim: int) -> bool:
    """Try whether a subclass of batch norm computes for some channels what it computes for them among others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, norm.num_features, *[2] * (ndim - 2), generator=generator, dtype=_dtype(norm))
    values = {id(t): torch.rand(t.shape, generator=generator).to(t.dtype) for t in _tensors(norm)}
    for kept in (slice(0, None, 2), slice(1, None, 2)) if norm.num_features > 1 else ():
        full = _with_tensors(norm, lambda t: values[id(t)].clone())
        cut = _with_tensors(norm, lambda t, kept=kept: values[id(t)][kept if t.ndim else ...].clone())  # type: ignore[misc]
        cut.num_features = images[:, kept].shape[1]
        # Torch's own SyncBatchNorm trains on GPUs alone.
        for training in (False,) if isinstance(norm, nn.SyncBatchNorm) else (False, True):
            try:
                alone, among = cut.train(training)(images[:, kept]), full.train(training)(images)[:, kept]
            except Exception:  # a user's forward may raise anything
                return False
            if alone.shape != among.shape or not torch.allclose(alone, among, rtol=1e-3, atol=1e-4):
                return False
    return True


def _with_tensors(norm: _BatchNorm, value: Callable[[torch.Tensor], torch.Tensor]) -> _BatchNorm:
    """Return a copy with other tensors in the place of those on the meta device."""
    # deepcopy takes from its second argument what is copied already.
    return copy.deepcopy(norm, {id(t): value(t) for t in _tensors(norm)})


def _tensors(norm: _BatchNorm) -> list[torch.Tensor]:
    return [*norm.parameters(), *norm.buffers()]


def _dtype(norm: _BatchNorm) -> torch.dtype | None:
    return next((t.dtype for t in _tensors(norm) if t.is_floating_point()), None)


def _may_select(node: fx.Node, modules: Mapping[str, nn.Module], kind: str | None) -> bool:
    """Tell whether a module should select from what it reads: others read it too, or several layers write it.

    Parameters
    ----------
    node : fx.Node
        The call of a module.
    modules : mapping of str to nn.Module
        All modules of the network.
    kind : {"norm", "conv"}, optional
        Which modules may select at all: batch norms, or convolutions that start a residual branch.

    Examples
    --------
    >>> class Dense(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return torch.cat([x, self.norm(x)], 1)
    >>> model = Dense()
    >>> [node.name for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"
    ...  and _may_select(node, dict(model.named_modules()), "norm")]
    ['norm']
    """
    module = modules[str(node.target)]
    if kind == "norm":
        return isinstance(module, _BatchNorm) and _is_shared(node, modules)
    if kind == "conv" and isinstance(module, nn.Conv2d) and module.groups == 1:
        return _is_shared(node, modules) and not _is_projection(node, modules)
    return False


def _is_shared(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node's input is anything but the output of one layer for this reader alone."""
    (source, *_) = node.all_input_nodes
    while source.op != "placeholder":
        if len(_channel_readers(source)) > 1 or len(source.all_input_nodes) != 1:
            return True
        if source.op == "call_module" and isinstance(modules[str(source.target)], (nn.Conv2d, nn.Linear)):
            return False
        (source,) = source.all_input_nodes
    return False


def _is_projection(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a convolution's output meets an addition before any other layer: a shortcut has to see all."""
    while len(_channel_readers(node)) == 1:
        (node,) = _channel_readers(node)
        if len(node.all_input_nodes) > 1:
            return node.op != "call_module" and operation_name(node) == "add"
        if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Conv2d, nn.Linear)):
            return False
    return False


def _channel_readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value, not counting those that only ask for its shape."""
    shape = ("size", "getattr", "dim")
    return [user for user in node.users if user.op == "call_module" or operation_name(user) not in shape]
