"""Rules of what attention is made of: products of matrices, softmax, linear functions, parameters read by themselves.

Heads lie along a dimension of their own, in front of tokens and widths. A product of matrices keeps that dimension, so
a head passes attention as a channel passes a convolution with groups: queries, keys and values of a head go together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from string import ascii_letters
from typing import Any

import torch
from torch import nn

from rethink_prune.surgery.channel_ids import (
    Call,
    ChannelCount,
    ChannelIds,
    ChannelStream,
    Flow,
    NoRule,
    OwnTensor,
    count_from_end,
)


def follow_matmul(ids: ChannelIds, call: Call) -> Flow:
    """Multiply matrices: the last dimension of one with the last but one of the other, all others side by side."""
    first, second = (call.value(position, name) for position, name in ((0, "input"), (1, "other")))
    if min(first.ndim, second.ndim) < 2:
        raise NoRule("product with a vector")
    batch = ascii_letters[: max(first.ndim, second.ndim) - 2]
    # Letters from the end, because a missing dimension is one in front.
    parts = [f"{batch[len(batch) - (tensor.ndim - 2) :]}{ends}" for tensor, ends in ((first, "YX"), (second, "XZ"))]
    return _contract(ids, call, [call.flow(0, "input"), call.flow(1, "other")], [first, second], parts, batch + "YZ")


def follow_einsum(ids: ChannelIds, call: Call) -> Flow:
    """Multiply and sum as the equation says."""
    equation: str = call.value(0, "equation")
    flows: Sequence[Any] = call.flow_args[1:]
    tensors: Sequence[Any] = call.args[1:]
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        flows, tensors = flows[0], tensors[0]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or "." in equation or len(parts) != len(tensors):
        raise NoRule("einsum in a short form")
    return _contract(ids, call, flows, tensors, parts, output)


def _contract(
    ids: ChannelIds,
    call: Call,
    flows: Sequence[Any],
    tensors: Sequence[torch.Tensor],
    parts: Sequence[str],
    output: str,
) -> Flow:
    """Follow channels through a sum of products, whose dimensions have letters as in einsum."""
    streams = {
        index: (part[flow.axis], flow)
        for index, (part, flow) in enumerate(zip(parts, flows, strict=True))
        if isinstance(flow, ChannelStream)
    }
    if any(isinstance(flow, ChannelCount) for flow in flows) or len(streams) != len(call.channel_flows()):
        raise NoRule(f"{call.name} with a channel count")
    letters = list(dict.fromkeys(letter for letter, _ in streams.values()))
    if sum(letter in output for letter in letters) > 1:
        raise NoRule(f"{call.name} of channels along different dimensions")
    result: Flow = None
    for letter in letters:
        found: list[ChannelStream] = []
        for index, (part, flow, tensor) in enumerate(zip(parts, flows, tensors, strict=True)):
            if letter not in part or tensor.shape[part.index(letter)] == 1:
                continue
            if index in streams and streams[index][0] == letter:
                found.append(streams[index][1])
                continue
            own = ids.along(flow, part.index(letter) - len(part)) if isinstance(flow, OwnTensor) else None
            if own is None:  # the dimension would have to be cut in a tensor that no layer owns
                for _, stream in streams.values():
                    ids.freeze(stream.ids, f"{call.label}: multiplied with a tensor that stays whole")
                return None
            found.append(own)
        for stream in found[1:]:
            ids.united.append((found[0].ids, stream.ids))
        # A product is zero where one factor is.
        zero = any(stream.zero for stream in found)
        if letter in output:
            ids.confirmed += [stream.ids for stream in found]
            axis, all_own = output.index(letter) - len(output), all(stream.own for stream in found)
            result = replace(found[0], axis=axis, zero=zero, own=all_own)
        else:
            _sum_over(ids, call, found, zero)
    return result


def _sum_over(ids: ChannelIds, call: Call, streams: Sequence[ChannelStream], zero: bool) -> None:
    """Sum over channels: without one, its product is missing, which must be zero."""
    reason = "" if zero else "reads values that are not zero in a masked channel"
    if ids.attention == "heads" and any(ids.is_split(stream) for stream in streams):
        reason = "the widths of heads, which go with pruner.attention=widths"
    for stream in streams:
        if reason:
            ids.freeze(stream.ids, f"{call.label}: {reason}")
        ids.confirmed.append(stream.ids)


def follow_attention(ids: ChannelIds, call: Call) -> Flow:
    """Follow heads, or the widths of heads, through ``scaled_dot_product_attention``."""
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = (call.flow(position, name) for position, name in enumerate(names))
    if call.kwargs.get("enable_gqa"):
        raise NoRule("attention whose heads share keys and values")
    masks = call.value(3, "attn_mask")
    streams = [flow for flow in (query, key, value) if isinstance(flow, ChannelStream)]
    heads = [stream for stream in streams if stream.axis < -2]
    if heads:
        axis = heads[0].axis
        if len(heads) != 3 or {stream.axis for stream in heads} != {axis}:
            raise NoRule("attention of which not all of queries, keys and values have heads that can be followed")
        if isinstance(masks, torch.Tensor) and masks.ndim >= -axis and masks.shape[axis] > 1:
            bias = ids.as_stream(mask, axis)
            if bias is None:
                raise NoRule("attention with a mask for each head that stays whole")
            heads.append(bias)
        for stream in heads[1:]:
            ids.united.append((heads[0].ids, stream.ids))
        ids.confirmed += [stream.ids for stream in heads]
        return value
    queries = [flow for flow in (query, key) if isinstance(flow, ChannelStream)]
    if {stream.axis for stream in streams} - {-1} or len(queries) == 1 or isinstance(mask, ChannelStream):
        raise NoRule("attention along other dimensions")
    if len(queries) == 2:
        ids.united.append((queries[0].ids, queries[1].ids))
        _sum_over(ids, call, queries, queries[0].zero or queries[1].zero)
        if call.value(6, "scale") is None:  # it would follow the width
            ids.add_constant(call, "scale", 0, (queries[0].ids,), lambda n: (n,))
    if not isinstance(value, ChannelStream):
        return None
    ids.confirmed.append(value.ids)
    return value


def follow_softmax(ids: ChannelIds, call: Call) -> Flow:
    """Pass if no channel enters the sum of another; what was zero is not."""
    dim = call.dim(1) if call.module is None else getattr(call.module, "dim", None)
    if not isinstance(dim, int) or count_from_end(dim, call.result.ndim) == call.stream.axis:
        raise NoRule(f"{call.name} over the channels")
    return replace(call.stream, zero=False)


def follow_normalize(ids: ChannelIds, call: Call) -> Flow:
    """Divide by a norm over other dimensions; zero stays zero."""
    dim = call.value(2, "dim", 1)
    if not isinstance(dim, int) or count_from_end(dim, call.result.ndim) == call.stream.axis:
        raise NoRule(f"{call.name} over the channels")
    return call.stream


def follow_vector_norm(ids: ChannelIds, call: Call) -> Flow:
    """Take a norm over other dimensions, which remain with size one."""
    stream, dims = call.stream, call.dim(2)
    if dims is None or call.result.ndim != call.args[0].ndim:
        raise NoRule
    taken = {count_from_end(dim, call.result.ndim) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if stream.axis in taken:
        raise NoRule(f"{call.name} over the channels")
    return stream


def follow_masked_fill(ids: ChannelIds, call: Call) -> Flow:
    """Write a number where a mask says so, which must be the same mask for all channels."""
    stream, mask = call.stream, call.value(1, "mask")
    if mask.ndim >= -stream.axis and mask.shape[stream.axis] > 1:
        raise NoRule("a mask that stays whole")
    return replace(stream, zero=False)


def follow_roll(ids: ChannelIds, call: Call) -> Flow:
    """Pass if the channels are not moved."""
    stream, dims = call.stream, call.value(2, "dims", ())
    dims = dims if isinstance(dims, Sequence) else [dims]
    if not dims or any(count_from_end(dim, call.result.ndim) == stream.axis for dim in dims):
        raise NoRule("roll of channels")
    return stream


def follow_unbind(ids: ChannelIds, call: Call) -> Flow:
    """Part a tensor along another dimension than the channels'."""
    stream = call.stream
    dim = count_from_end(call.dim(1, 0), call.args[0].ndim)
    if dim == stream.axis:
        raise NoRule("picks channels one by one")
    return [replace(stream, axis=stream.axis + (dim > stream.axis))] * len(call.result)


def follow_stack(ids: ChannelIds, call: Call) -> Flow:
    """Lay tensors side by side along a new dimension: each channel of the result comes from all of them."""
    parts = call.flow(0, "tensors")
    streams = [part for part in parts if isinstance(part, ChannelStream)]
    if len(streams) != len(parts) or len({stream.axis for stream in streams}) != 1:
        raise NoRule("stack with a tensor that stays whole")
    for stream in streams[1:]:
        ids.united.append((streams[0].ids, stream.ids))
    new = count_from_end(call.dim(1, 0), call.result.ndim)
    axis = streams[0].axis - (new >= streams[0].axis)
    return replace(streams[0], axis=axis, zero=all(stream.zero for stream in streams))


def follow_index(ids: ChannelIds, call: Call) -> Flow:
    """Pick positions by one tensor of indexes, along another dimension than the channels'."""
    stream, index = call.stream, call.value(1, "indices", call.value(1, "index"))
    # A function has a list with None for whole dimensions; what is written in brackets may be one tensor alone.
    items = list(index) if isinstance(index, tuple | list) else [index]
    whole = [item is None or item == slice(None) for item in items if not isinstance(item, torch.Tensor)]
    picked = [(dim, item) for dim, item in enumerate(items) if isinstance(item, torch.Tensor)]
    if len(picked) != 1 or not all(whole) or picked[0][1].dtype == torch.bool:
        raise NoRule("indexed by a tensor or a list")
    dim, tensor = picked[0]
    behind = count_from_end(dim, call.args[0].ndim)
    if behind == stream.axis:
        raise NoRule("picks channels one by one")
    return replace(stream, axis=stream.axis - (tensor.ndim - 1) * (behind > stream.axis))


def follow_repeat(ids: ChannelIds, call: Call) -> Flow:
    """Repeat along other dimensions than the channels'."""
    stream = call.stream
    if call.result.shape[stream.axis] != len(stream.ids):
        raise NoRule("repeats channels")
    return stream


def follow_linear(ids: ChannelIds, call: Call) -> Flow:
    """Follow ``F.linear`` with the parameters of a module, as that module's call would be."""
    weight, bias = call.flow(1, "weight"), call.flow(2, "bias")
    if not isinstance(weight, OwnTensor):
        raise NoRule("linear function with a computed weight")
    name, key = weight.name.rpartition(".")[::2]
    layer = isinstance(ids.modules.get(name), nn.Linear) and key == "weight"
    # The projections of nn.MultiheadAttention, which has them in one parameter, count as its layer.
    joint = isinstance(ids.modules.get(name), nn.MultiheadAttention) and key == "in_proj_weight"
    if not (layer or joint):
        raise NoRule("linear function with a parameter that is no layer's")
    stream = call.flow(0, "input")
    if isinstance(stream, ChannelStream) and stream.axis == -1:
        ids.need_zero(stream, call)
        inputs = stream.ids
    else:
        if isinstance(stream, ChannelStream):
            ids.freeze(stream.ids, f"{call.label}: runs along another dimension")
        inputs = ids.fresh_frozen(weight.shape[1], f"{name}: reads channels that stay whole")
    outputs = ids.call_layer(name, inputs, weight.shape[0])
    if not ids.training:
        ids.function_outputs[name] = tuple(call.result.shape)
    if joint:
        # What a joint projection is called with is not known by its name: all of its tensors are cut by theirs.
        for tensor in (weight, bias):
            if isinstance(tensor, OwnTensor):
                ids.tensors.setdefault(tensor.name, {})[0] = outputs
        ids.tensors[weight.name][1] = ids.inputs[name]
    elif not isinstance(bias, OwnTensor | None) or (bias is not None and bias.name != f"{name}.bias"):
        # A bias put together from parameters of other names.
        if not isinstance(bias, ChannelStream):
            raise NoRule("linear function with a computed bias")
        ids.united.append((outputs, bias.ids))
    return ChannelStream(outputs, -1)


def follow_own_tensor(ids: ChannelIds, call: Call, rule: Callable[[ChannelIds, Call], Flow]) -> Flow:
    """Follow what is computed from parameters alone, along their last dimension; None where there is no rule."""

    def along_last(flow: Any) -> Any:
        if not isinstance(flow, OwnTensor):
            return flow
        axes = [axis for axis in range(-1, -len(flow.shape) - 1, -1) if flow.shape[axis] > 1]
        return ids.along(flow, axes[0]) if axes else None

    flow_args: Any = torch.fx.node.map_aggregate(call.flow_args, along_last)
    flow_kwargs: Any = torch.fx.node.map_aggregate(dict(call.flow_kwargs), along_last)
    changed = replace(call, flow_args=flow_args, flow_kwargs=flow_kwargs)
    try:
        return rule(ids, changed) if changed.channel_flows() else None
    except NoRule:
        for flow in changed.channel_flows():
            ids.freeze(flow.ids, f"{call.label}: unknown form of {call.name}")
        return None
