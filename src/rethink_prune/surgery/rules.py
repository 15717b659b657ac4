"""What each operation does to the ids of its input's channels: one short function per kind of operation.

A rule takes the ids and a call, notes what has to go together or must stay, and returns the flow of the
result. Where it does not know better it raises `NoRule`, and everything the call reads is left whole: a gap
in the rules costs pruning, never correctness.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rethink_prune.surgery.channel_ids import (
    Call,
    ChannelIds,
    Flow,
    Ids,
    ModulePadding,
    NoRule,
    Stream,
    Width,
    selection_of,
)
from rethink_prune.surgery.graph import selects

Rule = Callable[[ChannelIds, Call], Flow]


# ---- layers ----------------------------------------------------------------------------------------------


def module_rule(ids: ChannelIds, call: Call, module: nn.Module, *, selecting: bool) -> Flow:
    """Apply the rule of a module that is not traced into; `selecting` ones read a selection of their input."""
    if selecting:
        call = _selection(ids, call, module)
    # Exact classes, and no further parameters: a subclass or a parametrization may compute something else.
    plain = {name for name, _ in module.named_parameters()} <= {"weight", "bias"}
    if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and plain:
        return _layer(ids, call, module)
    if isinstance(module, _BatchNorm):
        return _batch_norm(ids, call, module)
    if not call.counted():
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return _channel_by_channel(ids, call, module.num_parameters)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, _InstanceNorm)):
        return _normalise(ids, call)
    family = type(module).__module__.removeprefix("torch.nn.modules.")
    if family == "padding":
        return _padding_module(ids, call, module)
    if family == "activation" and not isinstance(module, _NOT_ELEMENTWISE):
        return _elementwise(ids, call, module, in_place=getattr(module, "inplace", False))
    if isinstance(module, _KEEPING):
        return _keep(ids, call)
    if family == "pooling" and "Unpool" not in call.name:
        return _pool(ids, call)
    if family == "upsampling":
        return _resample(ids, call)
    if isinstance(module, nn.Flatten):
        return _reshape(ids, call)
    raise NoRule(f"unknown module {call.name}")


def _taken(ids: ChannelIds, call: Call, axis: int, count: int) -> Ids:
    """Return the ids along `axis` of a module's input; fresh, frozen ones if no stream runs there."""
    stream = call.flow(0, "input")
    if isinstance(stream, Stream):
        if stream.axis == axis:
            return stream.ids
        ids.freeze(stream.ids, f"{call.label}: runs along another dimension")
    return ids.whole(count, f"{call.label}: reads channels that stay whole")


def _layer(ids: ChannelIds, call: Call, layer: Any) -> Flow:
    """Give a convolution or linear layer fresh outputs; unite the inputs and outputs of each group."""
    name, linear = call.label, isinstance(layer, nn.Linear)
    axis, groups = (-1, 1) if linear else (-1 - len(layer.kernel_size), layer.groups)
    inputs = _taken(ids, call, axis, layer.in_features if linear else layer.in_channels)
    if groups == 1 and call.counted():  # with groups, the layer's own zero weights hide its input
        ids.need_zero(call.stream, call)
    if name in ids.outputs:
        ids.tie(ids.inputs[name], inputs)
    else:
        outputs = ids.fresh(layer.out_features if linear else layer.out_channels)
        ids.inputs[name], ids.outputs[name] = inputs, outputs
        if groups > 1:
            members = np.hstack([inputs.reshape(groups, -1), outputs.reshape(groups, -1)])
            ids.tie(np.broadcast_to(members[:, :1], members.shape).ravel(), members.ravel())
    return Stream(ids.outputs[name], axis)


def _selection(ids: ChannelIds, call: Call, module: nn.Module) -> Call:
    """Leave a stream whole for its other readers, and let this one read channels with ids of their own."""
    stream = call.stream
    ids.freeze(stream.ids, f"{call.label}: reads a selection of it")
    name = selection_of(call.label)
    if name not in ids.outputs:
        ids.outputs[name] = ids.fresh(len(module.get_buffer("selected")) if selects(module) else len(stream.ids))
    return replace(call, flow_args=(Stream(ids.outputs[name], stream.axis), *call.flow_args[1:]))


def _channel_by_channel(ids: ChannelIds, call: Call, count: int) -> Stream | None:
    """Let a stream pass a module that has parameters for each channel."""
    axis = 1 - call.result.ndim
    taken = _taken(ids, call, axis, count)
    ids.tie(ids.features.setdefault(call.label, taken), taken)
    return call.stream if call.counted() and call.stream.axis == axis else None


def _batch_norm(ids: ChannelIds, call: Call, norm: _BatchNorm) -> Flow:
    stream = _channel_by_channel(ids, call, norm.num_features)
    if stream is None:
        return None
    # A masked channel has scale and shift zero, whatever reaches it. Without these, only zeros give zero.
    zero = stream.zero or norm.affine
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        tensors = {name for name, _ in [*norm.named_parameters(), *norm.named_buffers()]}
        if tensors - {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}:
            raise NoRule(f"{call.name} has tensors of its own")
        zero = zero and _masked_norm_gives_zero(norm, call.result.ndim)
    return replace(stream, zero=zero)


def _masked_norm_gives_zero(norm: _BatchNorm, ndim: int) -> bool:
    """Try whether a subclass of batch norm, which may end in an activation, gives zero when masked."""
    tensors = [*norm.parameters(), *norm.buffers()]
    masked = copy.deepcopy(norm, {id(t): torch.zeros(t.shape, dtype=t.dtype) for t in tensors})
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    return not masked(torch.ones(1, norm.num_features, *[1] * (ndim - 2), dtype=dtype)).any().item()


def _normalise(ids: ChannelIds, call: Call) -> Flow:
    """Leave whole what is normalised over several channels: without one, the statistics of the others change.

    Instance norm does not mix channels, but is no part of the networks that are pruned, so it has no rule of
    its own.
    """
    for flow in call.counted():
        ids.freeze(flow.ids, f"{call.label}: normalised by {call.name}")
    return None


# ---- operations that work inside each channel ------------------------------------------------------------


def _keep(ids: ChannelIds, call: Call) -> Flow:
    """Pass: zero stays zero, and no channel sees another."""
    if not isinstance(call.result, torch.Tensor):
        raise NoRule
    return call.stream


def _pool(ids: ChannelIds, call: Call) -> Flow:
    """Pass if the pooled dimensions, 1 to 3 at the end, are not the channels."""
    dimensions = re.search(r"([123])d", call.name)
    if dimensions is None or call.stream.axis >= -int(dimensions[1]):
        raise NoRule(f"{call.name} along the channels")
    return _keep(ids, call)


def _resample(ids: ChannelIds, call: Call) -> Flow:
    """Pass if the channels are dimension 1; interpolation works on the dimensions after it."""
    if call.stream.axis != 1 - call.result.ndim:
        raise NoRule(f"{call.name} along the channels")
    return _keep(ids, call)


def _elementwise(
    ids: ChannelIds, call: Call, function: Callable[..., Any] | None = None, *, in_place: bool = False
) -> Flow:
    """Pass, after trying what the function makes of zero."""
    stream = call.stream
    others = [*call.args[1:], *call.kwargs.values()]
    if any(isinstance(value, torch.Tensor) for value in others):
        raise NoRule
    if function is None:
        target = call.node.target
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        in_place = str(getattr(target, "__name__", target)).endswith("_") or bool(call.kwargs.get("inplace"))
    image = function(torch.zeros(1), *call.args[1:], **call.kwargs)
    return _overwritten(ids, call, replace(stream, zero=stream.zero and not image.any().item()), in_place)


def _overwritten(ids: ChannelIds, call: Call, result: Stream, in_place: bool) -> Stream:
    """Freeze a result that is not zero if it is written to a tensor that others may read.

    They would read it as the tensor it was. The tensor belongs to this call alone if a computation made it
    for it.
    """
    operand = call.node.args[0]
    if in_place and not result.zero and isinstance(operand, fx.Node):
        computed = operand.op == "call_module" or _FUNCTION_RULES.get(operation_name(operand)) in _COMPUTING
        if len(operand.users) > 1 or not computed:
            ids.freeze(result.ids, f"{call.label}: overwrites a tensor with other readers")
    return result


# ---- arithmetic ------------------------------------------------------------------------------------------


def _arithmetic(ids: ChannelIds, call: Call) -> Flow:
    """Unite the operands of ``+ - * /``, channel by channel.

    A sum of zeros is zero. A product is zero where one factor is, so a gate that is not (squeeze and
    excitation) may be multiplied with the stream whose channels it scales.
    """
    additive = call.name in ("add", "sub")
    first, second = call.flow(0, "input"), call.flow(1, "other")
    if len(call.counted()) != sum(isinstance(operand, Stream) for operand in (first, second)):
        raise NoRule(f"{call.name} with a channel count")
    if call.name == "div" and isinstance(second, Stream) and second.zero:
        raise NoRule("division by a channel")
    if isinstance(first, Stream) and isinstance(second, Stream):
        result = _two_streams(ids, call, first, second, additive)
    elif isinstance(first, Stream):
        result = _stream_and_constant(ids, call, first, call.value(1, "other"), additive)
    elif call.name == "div":
        raise NoRule("division by a channel")
    else:
        assert isinstance(second, Stream)
        result = _stream_and_constant(ids, call, second, call.value(0, "input"), additive)
    target = call.node.target
    written = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = written.endswith("_") or written in _IN_PLACE_OPERATORS
    return None if result is None else _overwritten(ids, call, result, in_place)


def _two_streams(ids: ChannelIds, call: Call, first: Stream, second: Stream, additive: bool) -> Stream | None:
    if first.axis != second.axis:
        raise NoRule(f"{call.name} of channels along different dimensions")
    if len(first.ids) != len(second.ids):
        narrow, wide = sorted((first, second), key=lambda stream: len(stream.ids))
        ids.freeze(narrow.ids, f"{call.label}: one channel is broadcast over many")
        if call.name == "div" and wide is second:
            raise NoRule("division by a channel")
        return replace(wide, zero=wide.zero and not additive)
    ids.unite(first.ids, second.ids)
    if additive:
        ids.coupled += [first.ids, second.ids]
        return replace(first, zero=first.zero and second.zero)
    return replace(first, zero=first.zero or (second.zero and call.name == "mul"))


def _stream_and_constant(ids: ChannelIds, call: Call, stream: Stream, constant: Any, additive: bool) -> Stream | None:
    """Combine a stream with a number, a parameter, or another tensor that stays whole."""
    if isinstance(constant, torch.Tensor):
        width = constant.shape[stream.axis] if constant.ndim >= -stream.axis else 1
        if width > 1:
            ids.freeze(stream.ids, f"{call.label}: {call.name} with a tensor that stays whole")
            return None
        return replace(stream, zero=stream.zero and not additive)
    return replace(stream, zero=stream.zero and not (additive and constant != 0))


# ---- operations that move channels -----------------------------------------------------------------------


def _cat(ids: ChannelIds, call: Call) -> Flow:
    parts, tensors = call.flow(0, "tensors"), call.value(0, "tensors")
    axis = _from_end(call.dim(1, 0), call.result.ndim)
    streams = [part for part in parts if isinstance(part, Stream)]
    if len(streams) != len(call.counted()) or len({stream.axis for stream in streams}) != 1:
        raise NoRule
    if streams[0].axis != axis:  # side by side in space: each channel of the result comes from all parts
        for stream in streams[1:]:
            ids.unite(streams[0].ids, stream.ids)
        if len(streams) < len(parts):
            ids.freeze(streams[0].ids, f"{call.label}: joined with a tensor that stays whole")
        return replace(streams[0], zero=len(streams) == len(parts) and all(stream.zero for stream in streams))
    for stream in streams:
        ids.need_zero(stream, call)
    joined = [
        part.ids if isinstance(part, Stream) else ids.whole(tensor.shape[axis], f"{call.label}: joined whole")
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    return Stream(np.concatenate(joined), axis)


def _getitem(ids: ChannelIds, call: Call) -> Flow:
    """Take a slice of a stream, or a part of a tuple."""
    container, index = call.flow(0, "input"), call.value(1, "index")
    if not isinstance(container, Stream):
        if isinstance(container, Sequence) and isinstance(index, int | slice):
            return container[index]
        raise NoRule
    written = call.written(1, "index")
    items = list(written) if isinstance(written, tuple | list) else [written]
    ndim = call.args[0].ndim
    missing = ndim - sum(item is not None and item is not Ellipsis for item in items)
    ellipsis = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[ellipsis : ellipsis + 1] = [slice(None)] * missing
    if not all(item is None or isinstance(item, int | slice | fx.Node) for item in items):
        raise NoRule("indexed by a tensor or a list")
    consumed = [position for position, item in enumerate(items) if item is not None]
    position = consumed[ndim + container.axis]
    channels, after = items[position], items[position + 1 :]
    if len(call.counted()) > 1 or call.result.ndim != sum(not _drops_dimension(item) for item in items):
        raise NoRule
    axis = -1 - sum(not _drops_dimension(item) for item in after)
    if channels == slice(None):
        return replace(container, axis=axis)
    if not isinstance(channels, slice) or channels.step not in (None, 1):
        raise NoRule("picks channels one by one or in steps")
    if not all(bound is None or isinstance(bound, int) for bound in (channels.start, channels.stop)):
        raise NoRule("slices channels at a computed place")

    def counts(width: int) -> tuple[int, ...]:
        start, stop, _ = channels.indices(width)
        return start, max(0, stop - start)

    before, inside = counts(len(container.ids))
    pieces = container.ids[:before], container.ids[before : before + inside]
    ids.add_constant(call, "slice", position - (missing - 1 if ellipsis < position else 0), pieces, counts)
    return Stream(pieces[1], axis, container.zero)


def _drops_dimension(item: Any) -> bool:
    return isinstance(item, int | fx.Node)


def _narrow(ids: ChannelIds, call: Call) -> Flow:
    stream, start, length = call.stream, call.written(2, "start"), call.written(3, "length")
    if not isinstance(start, int) or not isinstance(length, int):
        raise NoRule
    if _from_end(call.dim(1), call.result.ndim) != stream.axis:
        return stream

    def counts(width: int) -> tuple[int, ...]:
        return start if start >= 0 else start + width, length

    first = counts(len(stream.ids))[0]
    pieces = stream.ids[:first], stream.ids[first : first + length]
    ids.add_constant(call, "narrow", 0, pieces, counts)
    return replace(stream, ids=pieces[1])


def _split(ids: ChannelIds, call: Call) -> Flow:
    """Part a stream by ``split`` (a size, or all sizes) or ``chunk`` (a number of pieces)."""
    stream, how = call.stream, call.written(1, "chunks" if call.name == "chunk" else "split_size")
    how = call.written(1, "split_size_or_sections") if how is None else how
    literal = isinstance(how, int) or (isinstance(how, tuple | list) and all(isinstance(n, int) for n in how))
    if not literal:
        raise NoRule
    if _from_end(call.dim(2, 0), call.args[0].ndim) != stream.axis:
        return [stream] * len(call.result)

    def sizes(width: int) -> tuple[int, ...]:
        if not isinstance(how, int):
            return tuple(how)
        whole = torch.empty(width, device="meta")
        return tuple(len(piece) for piece in (whole.chunk(how) if call.name == "chunk" else whole.split(how)))

    pieces = tuple(np.split(stream.ids, np.cumsum(sizes(len(stream.ids)))[:-1]))
    ids.add_constant(call, "split", 0, pieces, sizes)
    return [replace(stream, ids=piece) for piece in pieces]


def _pad(ids: ChannelIds, call: Call) -> Flow:
    stream, padding = call.stream, call.written(1, "pad")
    mode, value = call.value(2, "mode", "constant"), call.value(3, "value") or 0
    if not isinstance(padding, tuple | list):
        raise NoRule
    if mode != "constant":
        value = 0  # copies of the stream's own values
    position = _padding_position(stream)
    channels = padding[position : position + 2]
    if not any(channels):
        return _padded_elsewhere(stream, padding, value)
    if mode != "constant" or not all(isinstance(n, int) and n >= 0 for n in channels):
        raise NoRule(f"{mode} padding of channels")
    counts = tuple(channels)
    before, after = (_padded_channels(ids, call, n, value) for n in counts)
    ids.add_constant(call, "pad", position, (before, after), lambda width: counts)
    return _padded_elsewhere(replace(stream, ids=np.concatenate([before, stream.ids, after])), padding, value)


def _padding_module(ids: ChannelIds, call: Call, module: Any) -> Flow:
    """Pad by a module, whose attribute can be changed like a layer's width."""
    stream = call.stream
    constant = call.name.startswith(("ConstantPad", "ZeroPad"))
    value = getattr(module, "value", 0) if constant else 0
    padding = tuple(module.padding)
    position = _padding_position(stream)
    channels = padding[position : position + 2]
    if not any(channels):
        return _padded_elsewhere(stream, padding, value)
    if not constant or min(channels) < 0:
        raise NoRule(f"{call.name} of channels")
    if call.label not in ids.paddings:
        before, after = (_padded_channels(ids, call, n, value) for n in channels)
        ids.paddings[call.label] = ModulePadding(padding, position, before, after)
    added = ids.paddings[call.label]
    stream = replace(stream, ids=np.concatenate([added.before, stream.ids, added.after]))
    return _padded_elsewhere(stream, padding, value)


def _padded_channels(ids: ChannelIds, call: Call, count: int, value: float) -> Ids:
    """Return the ids of channels that padding adds; they can go with others only if they are zero."""
    added = ids.fresh(count)
    ids.coupled.append(added)
    if value != 0:
        ids.freeze(added, f"{call.label}: padded with {value}")
    return added


def _padding_position(stream: Stream) -> int:
    """Return where the channels' pair stands in a padding, which starts with the last dimension's."""
    return 2 * (-stream.axis - 1)


def _padded_elsewhere(stream: Stream, padding: Sequence[Any], value: float) -> Stream:
    position = _padding_position(stream)
    elsewhere = [*padding[:position], *padding[position + 2 :]]
    return replace(stream, zero=stream.zero and (value == 0 or not any(elsewhere)))


# ---- operations that change the layout -------------------------------------------------------------------


def _reshape(ids: ChannelIds, call: Call) -> Flow:
    """Follow channels through flatten, view, reshape, squeeze and unsqueeze; a flatten repeats ids."""
    stream = call.subject if call.name in _SIZED else call.stream
    layout = _layout(tuple(call.args[0].shape), stream.axis, tuple(call.result.shape))
    if layout is None:
        raise NoRule(f"{call.name} splits the channels")
    dim, outer, inner = layout
    result = replace(stream, ids=np.tile(np.repeat(stream.ids, inner), outer), axis=dim - call.result.ndim)
    return _sized(ids, call, result, dim) if call.name in _SIZED else result


def _layout(shape: tuple[int, ...], axis: int, new: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return the dimension of `new` that holds the channels, and the outer and inner factors merged into it.

    Both shapes describe the same row of numbers, ``outer dimensions x channels x inner dimensions``. The
    channels survive in a dimension of `new` if it starts inside the outer dimensions and ends inside the
    inner ones.
    """
    before, channels, after = prod(shape[:axis]), shape[axis], prod(shape[axis:]) // max(1, shape[axis])
    for dim, size in enumerate(new):
        lead, tail = prod(new[:dim]), prod(new[dim + 1 :])
        if before % lead or after % tail:
            continue
        outer, inner = before // lead, after // tail
        if outer * channels * inner == size:
            return dim, outer, inner
    return None


def _expand(ids: ChannelIds, call: Call) -> Flow:
    stream = call.subject
    if call.result.shape[stream.axis] != len(stream.ids):
        raise NoRule
    return _sized(ids, call, stream, call.result.ndim + stream.axis)


def _expand_as(ids: ChannelIds, call: Call) -> Flow:
    """Expand in space to the shape of a stream; the channels then have to match."""
    stream, like = call.subject, call.flow(1, "other")
    if not isinstance(like, Stream) or stream.axis != like.axis or len(stream.ids) != len(like.ids):
        raise NoRule
    ids.unite(stream.ids, like.ids)
    return stream


def _sized(ids: ChannelIds, call: Call, result: Stream, dim: int) -> Flow:
    """Check the sizes written in a view or expand: a number that counts channels has to follow them."""
    # view(2, -1), view((2, -1)), reshape(x, shape=(2, -1))
    sizes: Any = list(call.node.args[1:])
    flows: Any = list(call.flow_args[1:])
    if not sizes:
        sizes, flows = list(call.node.kwargs.values()), list(call.flow_kwargs.values())
    if isinstance(sizes[0], tuple | list):
        sizes, flows = sizes[0], flows[0]
    if dim >= len(sizes):
        raise NoRule
    size, width = sizes[dim], flows[dim]
    if len(call.counted()) > 1 + isinstance(width, Width):
        raise NoRule(f"{call.name} with a channel count")
    if isinstance(width, Width) and len(width.ids) == len(result.ids):
        ids.unite(width.ids, result.ids)
    elif isinstance(size, int):
        if size != -1:
            count = (size,)
            ids.add_constant(call, "size", dim, (result.ids,), lambda _: count)
    else:
        raise NoRule(f"{call.name} to a computed size")
    return result


def _permute(ids: ChannelIds, call: Call) -> Flow:
    stream = call.stream
    ndim = call.result.ndim
    if call.name == "permute":
        first = call.value(1, "dims")
        order = [dim % ndim for dim in (first if isinstance(first, Sequence) else call.args[1:])]
    else:  # transpose
        order = list(range(ndim))
        one, other = call.value(1, "dim0") % ndim, call.value(2, "dim1") % ndim
        order[one], order[other] = order[other], order[one]
    return replace(stream, axis=order.index(ndim + stream.axis) - ndim)


def _reduce(ids: ChannelIds, call: Call) -> Flow:
    """Follow channels through a mean, sum or extreme value over other dimensions."""
    stream, dims, keep_dims = call.stream, call.dim(1), call.value(2, "keepdim", False)
    if dims is None or not isinstance(call.result, torch.Tensor):
        raise NoRule
    ndim = call.args[0].ndim
    reduced = {_from_end(dim, ndim) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if stream.axis in reduced:
        raise NoRule(f"{call.name} over the channels")
    return stream if keep_dims else replace(stream, axis=stream.axis + sum(dim > stream.axis for dim in reduced))


# ---- reading shapes --------------------------------------------------------------------------------------


def _size(ids: ChannelIds, call: Call) -> Flow:
    stream, dim = call.stream, call.value(1, "dim")
    ndim = call.args[0].ndim
    widths = [Width(stream.ids) if i - ndim == stream.axis else None for i in range(ndim)]
    return widths if dim is None else widths[dim]


def _getattr(ids: ChannelIds, call: Call) -> Flow:
    name = call.args[1]
    if name == "shape" and call.stream is not None:
        return _size(ids, replace(call, args=call.args[:1]))
    if name in ("ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"):
        return None
    if name != "data":
        raise NoRule(f"unknown attribute {name}")
    return call.stream


def _tuple(ids: ChannelIds, call: Call) -> Flow:
    """Build a named tuple."""
    return [*call.flow_args, *call.flow_kwargs.values()]


def _nothing(ids: ChannelIds, call: Call) -> Flow:
    """Read something that no channel count enters."""
    return None


def _from_end(dim: int, ndim: int) -> int:
    return dim - ndim if dim >= 0 else dim


_KEEPING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.PReLU)
_NOT_ELEMENTWISE = (
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.GLU,
    nn.MultiheadAttention,
    nn.PReLU,
)
_SIZED = ("view", "reshape")
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv")

_NAMES: dict[Rule, str] = {
    _arithmetic: "add sub mul div",
    _cat: "cat concat concatenate",
    _elementwise: """
        abs atan celu clamp clamp_max clamp_min cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish
        hardtanh leaky_relu log1p logsigmoid mish nan_to_num neg pow relu relu6 rrelu selu sigmoid sign silu
        sin softplus softshrink softsign sqrt square tan tanh tanhshrink threshold
    """,
    _expand: "expand",
    _expand_as: "expand_as",
    _getattr: "getattr",
    _getitem: "getitem",
    _keep: """
        bfloat16 clone contiguous cpu cuda detach double dropout dropout1d dropout2d dropout3d feature_dropout
        float half stochastic_depth to type
    """,
    _narrow: "narrow",
    _normalise: "group_norm instance_norm layer_norm",
    _nothing: "dim get_device is_floating_point ndimension",
    _pad: "pad",
    _permute: "permute transpose swapaxes swapdims",
    _pool: """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d max_pool1d max_pool2d
        max_pool3d
    """,
    _reduce: "amax amin mean sum",
    _resample: "interpolate upsample",
    _reshape: "flatten reshape squeeze unsqueeze view",
    _size: "size",
    _split: "chunk split",
}
_FUNCTION_RULES: Mapping[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}

_COMPUTING = (_arithmetic, _elementwise)
_ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "multiply": "mul",
}


def function_rule(node: fx.Node) -> Rule:
    """Return the rule of a function or method node.

    Raises
    ------
    NoRule
        If there is none.
    """
    if hasattr(node.target, "_fields"):
        return _tuple
    name = operation_name(node)
    if name not in _FUNCTION_RULES:
        raise NoRule(f"unknown operation {name}")
    return _FUNCTION_RULES[name]


def operation_name(node: fx.Node) -> str:
    """Return the plain name of what a function or method node calls: ``x += y``, ``x.add_(y)`` are ``add``.

    Functions from elsewhere than torch are named by their module too, so that no rule takes them for torch's.
    """
    if isinstance(node.target, str):
        name = node.target.rstrip("_")
    else:
        name = getattr(node.target, "__name__", repr(node.target)).rstrip("_")
        home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        if home not in ("torch", "torchvision", "_operator", "builtins"):
            return f"{home}.{name}"
    return _ALIASES.get(name, name)
