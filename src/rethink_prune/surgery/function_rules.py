"""Rules of functions and methods.

In this order: operations inside each channel, arithmetic, what moves channels, what changes the layout or reads the
shape, and the table of all by the plain name of the operation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from rethink_prune.surgery import attention_rules
from rethink_prune.surgery.channel_ids import (
    Call,
    ChannelCount,
    ChannelIds,
    ChannelSplit,
    ChannelStream,
    Counts,
    Flow,
    Ids,
    NoRule,
    OwnTensor,
    count_from_end,
)
from rethink_prune.surgery.graph import operation_name, overwrites_operand

Rule = Callable[[ChannelIds, Call], Flow]
_TAKES_SHAPES = ("reshape_as", "view_as")
_TAKES_SIZES = ("view", "reshape", "unflatten")


def follow_normalisation(ids: ChannelIds, call: Call) -> Flow:
    """Leave whole what is normalised over several channels: without one, the statistics of the others change."""
    stream = call.flow(0, "input")
    shape = call.value(1, "normalized_shape") if call.module is None else getattr(call.module, "normalized_shape", None)
    if call.name.casefold() in ("layernorm", "layer_norm") and isinstance(stream, ChannelStream) and shape is not None:
        if stream.axis < -len(shape):  # each head is normalised by itself
            return replace(stream, zero=False)
        if ids.approximate and tuple(shape) == (len(stream.ids),):
            return _normalise_approximately(ids, call, stream)
    # Instance norm does not mix channels, but no network that is pruned here has it, so it shares this rule.
    for flow in call.channel_flows():
        ids.freeze(flow.ids, f"{call.label}: normalised by {call.name}")
    return None


def _normalise_approximately(ids: ChannelIds, call: Call, stream: ChannelStream) -> ChannelStream:
    """Let channels go that a layer norm normalises together, although the others' statistics change."""
    ids.statistics.append(call.label)
    if call.module is None:
        for tensor in (call.flow(2, "weight"), call.flow(3, "bias")):
            if isinstance(tensor, OwnTensor) and (own := ids.along(tensor, -1)) is not None:
                ids.united.append((stream.ids, own.ids))
        ids.add_constant(call, "normalized", 0, (stream.ids,), lambda _: (len(stream.ids),))
    else:
        ids.tied.append((ids.features.setdefault(call.label, stream.ids), stream.ids))
    return replace(stream, zero=True)


def follow_unchanged(ids: ChannelIds, call: Call) -> Flow:
    """Pass: zero stays zero, and no channel sees another."""
    if not isinstance(call.result, torch.Tensor):
        raise NoRule
    return call.stream


def follow_pooling(ids: ChannelIds, call: Call) -> Flow:
    """Pass if the pooled dimensions, 1 to 3 at the end, are not the channels."""
    # The name says how many dimensions are pooled: max_pool2d, AdaptiveAvgPool2d.
    dimensions = re.search(r"([123])d", call.name)
    if dimensions is None or call.stream.axis >= -int(dimensions[1]):
        raise NoRule(f"{call.name} along the channels")
    return follow_unchanged(ids, call)


def follow_resampling(ids: ChannelIds, call: Call) -> Flow:
    """Pass if the channels are dimension 1; interpolation works on the dimensions after it."""
    if call.stream.axis != 1 - call.result.ndim:
        raise NoRule(f"{call.name} along the channels")
    return follow_unchanged(ids, call)


def follow_elementwise(ids: ChannelIds, call: Call) -> Flow:
    """Pass, after trying what the function makes of zero."""
    stream, target = call.stream, call.node.target
    if any(isinstance(value, torch.Tensor) for value in [*call.args[1:], *call.kwargs.values()]):
        raise NoRule
    function: Any = call.module or (getattr(torch.Tensor, target) if isinstance(target, str) else target)
    # f(0) decides: a masked channel that becomes 0.5 in a sigmoid still reaches the next layer, a removed one does not.
    image = function(torch.zeros(1), *call.args[1:], **call.kwargs)
    return _freeze_if_overwritten(ids, call, replace(stream, zero=stream.zero and not image.any().item()))


def follow_arithmetic(ids: ChannelIds, call: Call) -> Flow:
    """Unite the operands of ``+ - * /``, channel by channel.

    A sum of zeros is zero. A product is zero where one factor is, so a gate that is not (squeeze and
    excitation) may be multiplied with the stream whose channels it scales.
    """
    first, second = call.flow(0, "input"), call.flow(1, "other")
    streams = [operand for operand in (first, second) if isinstance(operand, ChannelStream)]
    if len(call.channel_flows()) != len(streams):
        raise NoRule(f"{call.name} with a channel count")
    if len(streams) == 1:  # the other may be a parameter with a value for each channel
        axis = streams[0].axis
        other = ids.as_stream(second if streams[0] is first else first, axis)
        if other is not None and len(other.ids) == len(streams[0].ids):
            first, second = (flow if isinstance(flow, ChannelStream) else other for flow in (first, second))
            streams = [first, second]
    elif first.axis != second.axis and first.own != second.own:
        # Channels along another dimension of a parameter, such as tokens, are not what is followed here.
        (own,) = (stream for stream in streams if stream.own)
        ids.freeze(own.ids, f"{call.label}: {call.name} along another dimension")
        streams.remove(own)
    # A removed channel is zero, and something divided by zero is not.
    if call.name == "div" and isinstance(second, ChannelStream) and (second.zero or len(streams) == 1):
        raise NoRule("division by a channel")
    if len(streams) == 2:
        result = _unite_operands(ids, call, first, second)
    else:
        (stream,) = streams
        constant = call.value(1, "other") if stream is first else call.value(0, "input")
        is_tensor = isinstance(constant, torch.Tensor)
        # A tensor with a value per channel would have to be cut, too, and no layer owns it.
        if is_tensor and constant.ndim >= -stream.axis and constant.shape[stream.axis] > 1:
            ids.freeze(stream.ids, f"{call.label}: {call.name} with a tensor that stays whole")
            return None
        adds_nothing = call.name in ("mul", "div") or (not is_tensor and constant == 0)
        result = replace(stream, zero=stream.zero and adds_nothing)
    return _freeze_if_overwritten(ids, call, result)


def _unite_operands(ids: ChannelIds, call: Call, first: ChannelStream, second: ChannelStream) -> ChannelStream:
    additive = call.name in ("add", "sub")
    if first.axis != second.axis:
        raise NoRule(f"{call.name} of channels along different dimensions")
    if len(first.ids) != len(second.ids):
        # One channel scales all others, as in an attention map: it stays, they are free.
        narrow, wide = sorted((first, second), key=lambda stream: len(stream.ids))
        ids.freeze(narrow.ids, f"{call.label}: one channel is broadcast over many")
        if call.name == "div" and wide is second:
            raise NoRule("division by a channel")
        return replace(wide, zero=wide.zero and not additive)
    ids.united.append((first.ids, second.ids))
    # A bias for each head is no shortcut.
    if additive and not (first.own or second.own or ids.is_split(first) or ids.is_split(second)):
        ids.coupled += [first.ids, second.ids]
    # A sum of zeros is zero, and so is a product with a zero.
    zero = first.zero and second.zero if additive else first.zero or second.zero
    return replace(first, zero=zero, own=first.own and second.own)


def _freeze_if_overwritten(ids: ChannelIds, call: Call, result: ChannelStream) -> ChannelStream:
    """Freeze a result that is not zero if it is written to a tensor that others may read.

    They would read it as the tensor it was. The tensor belongs to this call alone if a computation made it
    for it.
    """
    operand = call.node.args[0]
    if not result.zero and isinstance(operand, fx.Node) and overwrites_operand(call.node, ids.modules):
        computed = RULES_BY_NAME.get(operation_name(operand)) in (follow_arithmetic, follow_elementwise)
        if len(operand.users) > 1 or not (computed or operand.op == "call_module"):
            ids.freeze(result.ids, f"{call.label}: overwrites a tensor with other readers")
    return result


def follow_concatenation(ids: ChannelIds, call: Call) -> Flow:
    """Join the ids, or unite them where streams are joined along another dimension."""
    parts, tensors = call.flow(0, "tensors"), call.value(0, "tensors")
    axis = count_from_end(call.dim(1, 0), call.result.ndim)
    known = next(part.axis for part in parts if isinstance(part, ChannelStream))
    parts = [ids.as_stream(part, known) if isinstance(part, OwnTensor) else part for part in parts]
    streams = [part for part in parts if isinstance(part, ChannelStream)]
    counts = any(isinstance(flow, ChannelCount) for flow in call.channel_flows())
    if counts or len({stream.axis for stream in streams}) != 1:
        raise NoRule
    if streams[0].axis != axis:  # side by side in space: each channel of the result comes from all parts
        for stream in streams[1:]:
            ids.united.append((streams[0].ids, stream.ids))
        if len(streams) < len(parts):
            ids.freeze(streams[0].ids, f"{call.label}: joined with a tensor that stays whole")
        return replace(streams[0], zero=len(streams) == len(parts) and all(stream.zero for stream in streams))
    # The joined stream says for all of its channels that masking makes them zero, so it must be true of every part.
    for stream in streams:
        ids.need_zero(stream, call)
    joined = []
    for part, tensor in zip(parts, tensors, strict=True):
        whole = not isinstance(part, ChannelStream)
        joined.append(ids.fresh_frozen(tensor.shape[axis], f"{call.label}: joined whole") if whole else part.ids)
    return ChannelStream(np.concatenate(joined), axis, own=all(stream.own for stream in streams))


def follow_getitem(ids: ChannelIds, call: Call) -> Flow:
    """Take a slice of a stream, or a part of a tuple."""
    container, index = call.flow(0, "input"), call.value(1, "index")
    if not isinstance(container, ChannelStream):
        if isinstance(container, Sequence) and isinstance(index, int | slice):
            return container[index]
        raise NoRule
    if any(isinstance(item, torch.Tensor) for item in (index if isinstance(index, tuple | list) else [index])):
        return attention_rules.follow_index(ids, call)
    written = call.written(1, "index")
    # Each item with its position in the index; an ellipsis, or the end, stands for all dimensions without an item.
    items = list(enumerate(written if isinstance(written, tuple | list) else [written]))
    ndim = call.args[0].ndim
    missing = ndim - sum(item is not None and item is not Ellipsis for _, item in items)
    ellipsis = next((position for position, item in items if item is Ellipsis), len(items))
    items[ellipsis : ellipsis + 1] = [(ellipsis, slice(None))] * missing
    if not all(item is None or isinstance(item, int | slice | fx.Node) for _, item in items):
        raise NoRule("indexed by a tensor or a list")
    # None adds a dimension and consumes none; an integer consumes one and gives none.
    place = [place for place, (_, item) in enumerate(items) if item is not None][ndim + container.axis]
    position, channels = items[place]
    remains = [not isinstance(item, int | fx.Node) for _, item in items]
    if len(call.channel_flows()) > 1 or call.result.ndim != sum(remains):
        raise NoRule
    result = replace(container, axis=-1 - sum(remains[place + 1 :]))
    if channels == slice(None):
        return result
    if not isinstance(channels, slice) or channels.step not in (None, 1):
        raise NoRule("picks channels one by one or in steps")
    if not all(bound is None or isinstance(bound, int) for bound in (channels.start, channels.stop)):
        raise NoRule("slices channels at a computed place")
    return _cut_out(ids, call, result, "slice", position, lambda n: (channels.indices(n)[0], len(range(n)[channels])))


def follow_narrow(ids: ChannelIds, call: Call) -> Flow:
    """Take a slice of a stream, given by its start and length."""
    stream, start, length = call.stream, call.written(2, "start"), call.written(3, "length")
    if not isinstance(start, int) or not isinstance(length, int):
        raise NoRule
    if count_from_end(call.dim(1), call.result.ndim) != stream.axis:
        return stream
    return _cut_out(ids, call, stream, "narrow", 0, lambda n: (start if start >= 0 else start + n, length))


def _cut_out(ids: ChannelIds, call: Call, stream: ChannelStream, kind: str, position: int, count: Counts) -> Flow:
    """Take a slice; `count` gives the channels before and inside it, from the number of all."""
    before, inside = count(len(stream.ids))
    pieces = stream.ids[:before], stream.ids[before : before + inside]
    ids.add_constant(call, kind, position, pieces, count)
    return replace(stream, ids=pieces[1])


def follow_split(ids: ChannelIds, call: Call) -> Flow:
    """Part a stream by ``split`` (a size, or all sizes) or ``chunk`` (a number of pieces)."""
    stream, how = call.stream, call.written(1, "chunks" if call.name == "chunk" else "split_size")
    how = call.written(1, "split_size_or_sections") if how is None else how
    if not all(isinstance(n, int) for n in (how if isinstance(how, tuple | list) else [how])):
        raise NoRule
    if count_from_end(call.dim(2, 0), call.args[0].ndim) != stream.axis:
        return [stream] * len(call.result)

    def count(width: int) -> tuple[int, ...]:
        if not isinstance(how, int):
            return tuple(how)
        # Torch knows how it divides what does not divide evenly.
        return tuple(len(piece) for piece in getattr(torch.empty(width, device="meta"), call.name)(how))

    pieces = tuple(np.split(stream.ids, np.cumsum(count(len(stream.ids)))[:-1]))
    ids.add_constant(call, "split", 0, pieces, count)
    return [replace(stream, ids=piece) for piece in pieces]


def follow_padding(ids: ChannelIds, call: Call) -> Flow:
    """Pad by a function, whose numbers stand in the graph, or by a module, whose attribute can be changed."""
    stream, module = call.stream, call.module
    if module is None:
        padding, mode = call.written(1, "pad"), call.value(2, "mode", "constant")
        constant, value, described = mode == "constant", call.value(3, "value") or 0, f"{mode} padding"
    else:
        padding, described = module.padding, call.name
        constant, value = described.startswith(("ConstantPad", "ZeroPad")), getattr(module, "value", 0)
    if not isinstance(padding, tuple | list):
        raise NoRule
    position = 2 * (-stream.axis - 1)  # a padding starts with the pair of the last dimension
    counts, elsewhere = tuple(padding[position : position + 2]), [*padding[:position], *padding[position + 2 :]]
    # A border that is not zero stays in a masked channel; modes that are not constant copy the channel's own values.
    stream = replace(stream, zero=stream.zero and (not constant or value == 0 or not any(elsewhere)))
    if not any(counts):
        return stream
    if not constant or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise NoRule(f"{described} of channels")
    if module is not None and call.label in ids.paddings:  # an earlier call of the module
        _, added = ids.paddings[call.label]
    else:
        added = ids.fresh(counts[0]), ids.fresh(counts[1])
        ids.coupled += added  # they tie others like an addition does
        if value != 0:  # it cannot go with channels that would be zero
            ids.freeze(np.concatenate(added), f"{call.label}: padded with {value}")
        if module is None:
            ids.add_constant(call, "pad", position, added, lambda _: counts)
        else:
            ids.paddings[call.label] = position, added
    return replace(stream, ids=np.concatenate([added[0], stream.ids, added[1]]))


def follow_reshape(ids: ChannelIds, call: Call) -> Flow:
    """Follow channels through flatten, view, reshape, squeeze and unsqueeze; a flatten repeats ids."""
    counts = call.name in _TAKES_SIZES
    stream = call.subject if counts or call.name in _TAKES_SHAPES else call.stream
    if call.name in _TAKES_SHAPES:
        like = call.flow(1, "other")
        if not isinstance(like, ChannelStream) or call.channel_flows() != [stream, like]:
            raise NoRule(f"{call.name} of something else")
    dims = _find_factors(tuple(call.args[0].shape), stream.axis, tuple(call.result.shape))
    if dims is None:
        raise NoRule(f"{call.name} splits the channels")
    dim = next(iter(dims))
    kept = stream.ids
    if len(dims) > 1:
        dim, kept = _split_channels(ids, call, stream.ids, {dim: factor for dim, (factor, _, _) in dims.items()})
    _, outer, inner = dims[dim]
    # After a flatten, each channel stands for as many features as it has pixels.
    result = replace(stream, ids=np.tile(np.repeat(kept, inner), outer), axis=dim - call.result.ndim)
    if call.name in _TAKES_SHAPES:
        if (like.axis, len(like.ids)) != (result.axis, len(result.ids)):
            raise NoRule(f"{call.name} of something else")
        ids.united.append((result.ids, like.ids))
    return _match_size(ids, call, result, dim) if counts else result


def _find_factors(shape: tuple[int, ...], axis: int, new: tuple[int, ...]) -> dict[int, tuple[int, int, int]] | None:
    """Return the dimensions of `new` that channels run along, each with three factors of its size.

    Both shapes describe the same row of numbers, ``outer dimensions x channels x inner dimensions``. The factors of a
    dimension are how many steps it takes along the channels, and what is merged into it from outside and inside. One
    dimension has all channels as a rule; several share them where heads are laid apart. None if channels are cut up.
    """
    # Any view that keeps channels apart is followed, and only those.
    begin = prod(shape[:axis])
    end = begin * shape[axis]
    found: dict[int, tuple[int, int, int]] = {}
    for dim, size in enumerate(new):
        lead = prod(new[:dim])
        first, last = max(lead, begin), min(lead * size, end)
        if first >= last:
            continue
        if first % lead or last % first or (lead * size) % last:
            return None
        found[dim] = last // first, first // lead, lead * size // last
    covered = prod(factor for factor, _, _ in found.values())
    if covered == shape[axis] == 1 and not found:  # a single channel stays where the outer dimensions end
        single = [dim for dim, size in enumerate(new) if prod(new[:dim]) == begin and size == 1]
        return {single[0]: (1, 1, 1)} if single else None
    return found if covered == shape[axis] else None


def _split_channels(ids: ChannelIds, call: Call, channels: Ids, factors: Mapping[int, int]) -> tuple[int, Ids]:
    """Choose the dimension, of several that share the channels, that may become shorter; return its ids."""
    dims, table = list(factors), channels.reshape(*factors.values())
    # Along some dimensions the channels may only be repeated.
    varying = [axis for axis, size in enumerate(table.shape) if size > 1 and np.any(np.diff(table, axis=axis))]
    if len(varying) == 1:
        kept = np.moveaxis(table, varying[0], 0).reshape(table.shape[varying[0]], -1)[:, 0]
        return dims[varying[0]], kept
    if not varying:
        raise NoRule(f"{call.name} splits the channels")
    # Heads stand before their widths; in some networks, queries, keys and values between the two.
    order = [varying[-1]] if ids.attention == "widths" else [*reversed(varying[:-1]), varying[-1]]
    place = ids.place(call)
    axis = order[min(ids.choices.get(place, 0), len(order) - 1)]
    rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
    kept = rows[:, 0]
    ids.tied.append((np.repeat(kept, rows.shape[1]), rows.ravel()))
    ids.splits.append(ChannelSplit(place, kept, channels, len(order)))
    return dims[axis], kept


def follow_expand(ids: ChannelIds, call: Call) -> Flow:
    """Expand in space to sizes."""
    stream = call.subject
    if call.result.shape[stream.axis] != len(stream.ids):
        raise NoRule
    return _match_size(ids, call, stream, call.result.ndim + stream.axis)


def follow_expand_as(ids: ChannelIds, call: Call) -> Flow:
    """Expand in space to the shape of a stream; the channels then have to match."""
    stream, like = call.subject, call.flow(1, "other")
    if not isinstance(like, ChannelStream) or stream.axis != like.axis or len(stream.ids) != len(like.ids):
        raise NoRule
    ids.united.append((stream.ids, like.ids))
    return stream


def _match_size(ids: ChannelIds, call: Call, result: ChannelStream, dim: int) -> ChannelStream:
    """Check the sizes written in a view or expand: a number that counts channels has to follow them."""
    # view(2, -1), view((2, -1)), reshape(x, shape=(2, -1)), unflatten(x, 1, (2, -1))
    skipped = 2 if call.name == "unflatten" else 1
    sizes = call.node.args[skipped:] or tuple(call.node.kwargs.values())
    flows = call.flow_args[skipped:] or tuple(call.flow_kwargs.values())
    if isinstance(sizes[0], tuple | list):
        sizes, flows = tuple(sizes[0]), flows[0]
    if call.name == "unflatten":
        dim -= call.args[0].ndim + count_from_end(call.args[1], call.args[0].ndim)
    if not 0 <= dim < len(sizes):
        raise NoRule
    size, width = sizes[dim], flows[dim]
    if len(call.channel_flows()) > 1 + isinstance(width, ChannelCount):
        raise NoRule(f"{call.name} with a channel count")
    if isinstance(width, ChannelCount) and len(width.ids) == len(result.ids):
        ids.united.append((width.ids, result.ids))
    elif not isinstance(size, int):
        # A size that the network computes may count channels in any way; what is left over counts them right.
        if -1 in sizes:
            raise NoRule(f"{call.name} to a computed size")
        ids.add_constant(call, "infer", dim, (result.ids,), lambda n: (n,))
    elif size != -1:
        ids.add_constant(call, "size", dim, (result.ids,), lambda _: (size,))
    return result


def follow_permutation(ids: ChannelIds, call: Call) -> Flow:
    """Follow channels to their new dimension."""
    stream, ndim = call.stream, call.result.ndim
    # A tensor whose sizes are the numbers of its dimensions: afterwards, they say where each dimension went.
    numbered = torch.empty(*range(ndim), device="meta")
    order = getattr(numbered, call.name)(*call.args[1:], **call.kwargs).shape
    return replace(stream, axis=order.index(ndim + stream.axis) - ndim)


def follow_reduction(ids: ChannelIds, call: Call) -> Flow:
    """Follow channels through a mean, sum or extreme value over other dimensions."""
    stream, dims, keep_dims = call.stream, call.dim(1), call.value(2, "keepdim", False)
    if dims is None or not isinstance(call.result, torch.Tensor):
        raise NoRule
    ndim = call.args[0].ndim
    reduced = {count_from_end(dim, ndim) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if stream.axis in reduced:
        raise NoRule(f"{call.name} over the channels")
    return stream if keep_dims else replace(stream, axis=stream.axis + sum(dim > stream.axis for dim in reduced))


def follow_size(ids: ChannelIds, call: Call) -> Flow:
    """Give the channel count where the size of that dimension is read."""
    # A network that reads a width and builds a view from it (x.view(n, c, 1, 1)) adapts by itself.
    stream, dim = call.stream, call.value(1, "dim")
    ndim = call.args[0].ndim
    counts = [ChannelCount(stream.ids) if i - ndim == stream.axis else None for i in range(ndim)]
    return counts if dim is None else counts[dim]


def follow_getattr(ids: ChannelIds, call: Call) -> Flow:
    """Read an attribute of a tensor: its shape, or what no channel count enters."""
    name = call.args[1]
    if name == "shape":
        return follow_size(ids, replace(call, args=call.args[:1]))
    if name in ("ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"):
        return None
    if name != "data":
        raise NoRule(f"unknown attribute {name}")
    return call.stream


def _build_named_tuple(ids: ChannelIds, call: Call) -> Flow:
    return [*call.flow_args, *call.flow_kwargs.values()]


def _read_no_channels(ids: ChannelIds, call: Call) -> Flow:
    """Read something that no channel count enters."""
    return None


_NAMES: dict[Rule, str] = {
    follow_expand: "expand",
    follow_expand_as: "expand_as",
    follow_getattr: "getattr",
    follow_permutation: "permute transpose swapaxes swapdims movedim",
    follow_reduction: "amax amin mean sum",
    follow_reshape: "flatten reshape reshape_as squeeze unflatten unsqueeze view view_as",
    follow_size: "size sym_size",
    follow_concatenation: "cat concat concatenate",
    follow_getitem: "getitem",
    follow_narrow: "narrow",
    follow_padding: "pad",
    follow_split: "chunk split split_with_sizes",
    follow_arithmetic: "add sub mul div",
    follow_elementwise: """
        abs atan celu clamp clamp_max clamp_min cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh
        leaky_relu log1p logsigmoid mish nan_to_num neg pow relu relu6 rrelu selu sigmoid sign silu sin softplus
        softshrink softsign sqrt square tan tanh tanhshrink threshold
    """,
    follow_pooling: """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d
    """,
    follow_resampling: "interpolate upsample upsample_bicubic2d upsample_bilinear2d upsample_nearest2d",
    attention_rules.follow_attention: "scaled_dot_product_attention",
    attention_rules.follow_einsum: "einsum",
    attention_rules.follow_index: "index",
    attention_rules.follow_linear: "linear",
    attention_rules.follow_masked_fill: "masked_fill",
    attention_rules.follow_matmul: "bmm matmul",
    attention_rules.follow_normalize: "normalize",
    attention_rules.follow_repeat: "repeat",
    attention_rules.follow_roll: "roll",
    attention_rules.follow_softmax: "log_softmax softmax",
    attention_rules.follow_stack: "stack",
    attention_rules.follow_unbind: "unbind",
    attention_rules.follow_vector_norm: "linalg_vector_norm",
    follow_unchanged: """
        bfloat16 clone contiguous cpu cuda detach double dropout dropout1d dropout2d dropout3d feature_dropout
        float half stochastic_depth to type zero
    """,
    follow_normalisation: "group_norm instance_norm layer_norm",
    _read_no_channels: "dim get_device is_floating_point ndimension new_empty new_full new_ones new_zeros",
}
RULES_BY_NAME: Mapping[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def function_rule(node: fx.Node) -> Rule:
    """Return the rule of a function or method node.

    Raises
    ------
    NoRule
        If there is none.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> function_rule(graph.call_method("relu_", (graph.placeholder("x"),))).__name__
    'follow_elementwise'
    """
    if hasattr(node.target, "_fields"):
        return _build_named_tuple
    name = operation_name(node)
    if name not in RULES_BY_NAME:
        raise NoRule(f"unknown operation {name}")
    return RULES_BY_NAME[name]
