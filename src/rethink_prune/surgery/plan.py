"""What a cut keeps of each module, from which channels are kept."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.errors import UserError
from rethink_prune.surgery.channel_ids import ChannelIds, FollowedNode, Ids
from rethink_prune.surgery.selections import selecting_module

Positions = tuple[int, ...]


@dataclass(frozen=True)
class CutPlan:
    """What to keep of each module; modules that stay as they are do not appear.

    Attributes
    ----------
    input_shape : tuple of int
        The shape the network was analysed with.
    operations : mapping of str to (str, tuple of int)
        What each node of the evaluation graph calls, and the shape it must have after surgery.
    outputs : mapping of str to tuple of int
        Kept output positions of convolutions and linear layers, kept channels of batch norms.
    inputs : mapping of str to tuple of int
        Kept input positions of convolutions without groups and of linear layers (features, after a flatten).
    selections : mapping of str to tuple of int
        The channels that a batch norm or convolution reads of a stream that stays whole.
    attributes : mapping of str to mapping of str to value
        The attributes to set: ``out_channels``, ``in_channels``, ``groups``, ``num_features``, ...
    edits : mapping of str to mapping
        New numbers for constants in the graph that count channels, by node name; see `cut`.
    widths : mapping of str to (int, int)
        Kept and full output channels of every convolution, linear layer and selection.
    """

    input_shape: tuple[int, ...]
    operations: dict[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    outputs: dict[str, Positions] = field(default_factory=dict)
    inputs: dict[str, Positions] = field(default_factory=dict)
    selections: dict[str, Positions] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)


def plan_cut(keep: npt.NDArray[np.bool_], ids: ChannelIds) -> CutPlan:
    """Return what each module keeps.

    Parameters
    ----------
    keep : ndarray of bool
        For each id, whether its channel is kept.
    ids : ChannelIds
        From the analysis of the network.

    Raises
    ------
    UserError
        If a module would be left without channels.
    """
    operations = {name: (node.call, _shape_after(node, keep)) for name, node in ids.nodes.items()}
    plan = CutPlan(ids.input_shape, operations)
    plan.widths.update({name: (int(keep[values].sum()), len(values)) for name, values in ids.outputs.items()})
    for name, kept in _find_cut(ids.outputs, keep):
        module = selecting_module(name)
        if module is None:
            plan.outputs[name] = kept
            layer = ids.modules[name]
            plan.attributes[name]["out_features" if isinstance(layer, nn.Linear) else "out_channels"] = len(kept)
        else:
            # Positions count what the module selects so far; the architecture counts the channels of the stream.
            before = ids.selected.get(module)
            plan.selections[module] = kept if before is None else tuple(before[position] for position in kept)
    for name, kept in _find_cut(ids.inputs, keep):
        layer = ids.modules[name]
        plan.attributes[name]["in_features" if isinstance(layer, nn.Linear) else "in_channels"] = len(kept)
        groups = getattr(layer, "groups", 1)
        if groups == 1:
            plan.inputs[name] = kept
        else:  # whole groups go, which are rows of the weight; its columns are those of one group
            plan.attributes[name]["groups"] = groups * len(kept) // len(ids.inputs[name])
    # A batch norm's channels, or the slopes of a PReLU with one for each channel.
    for name, kept in _find_cut(ids.features, keep):
        plan.outputs[name] = kept
        norm = isinstance(ids.modules[name], _BatchNorm)
        plan.attributes[name]["num_features" if norm else "num_parameters"] = len(kept)
    for name, (position, added) in ids.paddings.items():
        full: Any = ids.modules[name].padding
        counts = [int(keep[side].sum()) for side in added]
        if counts != list(full[position : position + 2]):
            plan.attributes[name]["padding"] = [*full[:position], *counts, *full[position + 2 :]]
    for constant in ids.constants:
        counts = [int(keep[piece].sum()) for piece in constant.pieces]
        # An operation such as x[:, 4:] or chunk arrives at other counts by itself.
        if counts != list(constant.unedited(int(keep[constant.stream].sum()))):
            plan.edits[constant.node] = {"kind": constant.kind, "position": constant.position, "counts": counts}
    return plan


def _shape_after(node: FollowedNode, keep: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    if node.stream is None:
        return node.shape
    dim = len(node.shape) + node.stream.axis
    return (*node.shape[:dim], int(keep[node.stream.ids].sum()), *node.shape[dim + 1 :])


def _find_cut(table: Mapping[str, Ids], keep: npt.NDArray[np.bool_]) -> Iterator[tuple[str, Positions]]:
    """Yield the modules of a table that lose channels, with the positions they keep."""
    for name, values in table.items():
        kept = np.flatnonzero(keep[values])
        if not len(kept):
            # Torch runs a convolution without inputs, and returns its bias.
            raise UserError(f"{name}: would be left without channels")
        if len(kept) < len(values):
            yield name, tuple(kept.tolist())
