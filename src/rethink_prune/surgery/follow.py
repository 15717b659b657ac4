"""Pushing channel ids through a traced network: every node's rule, in the order of execution."""

from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from rethink_prune.surgery.channel_ids import Call, ChannelIds, ChannelStream, Flow, FollowedNode, NoRule
from rethink_prune.surgery.graph import called_module, describe_call, infer_values, operation_name
from rethink_prune.surgery.rules.functions import function_rule
from rethink_prune.surgery.rules.modules import follow_module


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
                flow = follow_module(ids, call, selecting)
            elif node.op == "get_attr":
                ids.read_directly.add(str(node.target))
            elif node.op == "output":
                # Classes, or features that another network reads: their number is not ours to change.
                for stream in call.channel_flows():
                    ids.freeze(stream.ids, "network output")
            elif call.channel_flows():
                flow = function_rule(node)(ids, call)
            # A rule may not know every form of its operation; the shapes tell.
            if isinstance(flow, ChannelStream) and len(flow.ids) != call.result.shape[flow.axis]:
                flow = None
                raise NoRule
        except NoRule as reason:
            ids.freeze_operands(call, str(reason) or f"unknown form of {call.name}")
        flows[node] = flow
        if isinstance(call.result, torch.Tensor):
            followed = flow if isinstance(flow, ChannelStream) else None
            nodes[node.name] = FollowedNode(describe_call(node), tuple(call.result.shape), followed)
    return nodes


def tie_shared_parameters(ids: ChannelIds) -> None:
    """Tie modules with a parameter in common; freeze modules whose parameter is read outside of them."""
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
