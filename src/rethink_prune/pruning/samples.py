"""Random samples of what layers read, for pruners that reconstruct a layer's output from fewer channels.

Such a pruner works on a `WorkingCopy` of the network and changes it in place as it goes from layer to layer, so a later
layer is sampled through the part that is already pruned. The images are run anew for every layer and only up to it:
memory depends on the batch, not on how many images there are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches
from rethink_prune.surgery.channels import ChannelGroup, Channels
from rethink_prune.surgery.graph import infer_values, operation_name, trace
from rethink_prune.surgery.selections import selects

# Float64 values of one piece of a sample that are in memory at a time: 32 MB.
_PIECE = 2**22


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a group.

    Attributes
    ----------
    layer : str
        Name of the convolution or linear layer.
    nodes : tuple of str
        Its calls in the graph: one, as a rule.
    columns : torch.Tensor
        The positions of the group's channels among the layer's inputs, ordered by unit: int64.
    units : torch.Tensor
        The unit that each of `columns` belongs to. A unit has one column as a rule, several after a flatten.
    """

    layer: str
    nodes: tuple[str, ...]
    columns: torch.Tensor
    units: torch.Tensor


@dataclass(frozen=True)
class Shortcut:
    """What a layer's output is added to.

    Attributes
    ----------
    addition : str
        The node of the addition.
    operand : int
        Which of its arguments the shortcut is.
    norm : str, optional
        The batch norm between the layer and the addition.
    """

    addition: str
    operand: int
    norm: str | None


class WorkingCopy(fx.Interpreter):
    """A copy of a network in evaluation mode, to be pruned in place and run up to any of its operations.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    device : torch.device
        Where the copy runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        network = copy.deepcopy(model).to(device)
        if all(parameter.ndim < 5 for parameter in network.parameters()):
            network.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU
        super().__init__(network, graph=trace(network))
        self.device = device
        self._modules = dict(network.named_modules())
        self._nodes = {node.name: node for node in self.graph.nodes}
        self._dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        self._rewritten: set[str] = set()

    def readers(self, channels: Channels, group: ChannelGroup) -> list[Reader]:
        """Return the layers that read a group's channels; layers with one weight in common count as one."""
        readers: dict[int, Reader] = {}
        for layer, positions in channels.inputs(group).items():
            weight = self.layer(layer).weight
            nodes = tuple(
                node.name
                for node in self.graph.nodes
                if node.op == "call_module" and getattr(self._modules[str(node.target)], "weight", None) is weight
            )
            if nodes:  # a head for training only is not called
                columns = [position for unit in positions for position in unit]
                units = [index for index, unit in enumerate(positions) for _ in unit]
                tables = torch.tensor([columns, units], device=self.device)
                readers.setdefault(id(weight), Reader(layer, nodes, *tables))
        return list(readers.values())

    def layer(self, name: str) -> Any:
        """Return a convolution or linear layer of the copy."""
        return self._modules[name]

    @torch.no_grad()
    def read(self, nodes: Collection[str], images: torch.Tensor) -> dict[str, tuple[Any, ...]]:
        """Run the network until these operations have their arguments, and return those.

        Parameters
        ----------
        nodes : collection of str
            Names of graph nodes.
        images : torch.Tensor
            A batch.

        Returns
        -------
        dict of str to tuple
            Copies of each operation's positional arguments, because later operations may work in place.
        """
        found: dict[str, tuple[Any, ...]] = {}
        images = images.to(self.device, self._dtype)
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self.args_iter = iter([images])
        for node in self.graph.nodes:
            if node.name in nodes:
                args, _ = self.fetch_args_kwargs_from_env(node)
                found[node.name] = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
                if len(found) == len(nodes):
                    break
            self.env[node] = self.run_node(node)
            for used_up in self.user_to_last_uses.get(node, ()):
                del self.env[used_up]
        self.env.clear()
        return found

    def weight(self, layer: str) -> torch.Tensor:
        """Return a copy of a layer's weight as C_out x C_in x K in float64, K the kernel's size (1 if linear)."""
        weight = self.layer(layer).weight.detach().double()
        return weight.reshape(*weight.shape[:2], -1).clone()

    def rewrite(self, layer: str, weight: torch.Tensor) -> None:
        """Write back what :meth:`weight` gave, changed."""
        parameter = self.layer(layer).weight.detach()
        parameter.copy_(weight.reshape(parameter.shape))
        self._rewritten.add(layer)

    def remove(self, group: ChannelGroup, dropped: Sequence[int], readers: Sequence[Reader]) -> None:
        """Mask units of a group to zero: where they are written, normalised and read."""
        for reader in readers:
            weight = self.weight(reader.layer)
            gone = torch.isin(reader.units, torch.tensor(dropped, device=self.device))
            weight[:, reader.columns[gone]] = 0
            self.rewrite(reader.layer, weight)
        if group.kind == "selection":  # the stream stays whole for its other readers
            return
        for unit in dropped:
            places = {**group.units[unit], **{norm: positions[unit] for norm, positions in group.norms.items()}}
            for name, positions in places.items():
                module = self._modules[name]
                tensors = [module.weight, module.bias]
                if module.weight is None:
                    tensors = [module.running_mean]  # a norm without scale and shift
                for tensor in tensors:
                    if isinstance(tensor, torch.Tensor):
                        tensor.detach()[list(positions)] = 0

    def rewritten(self, model: nn.Module) -> nn.Module:
        """Return a copy of `model`, which this was made of, with the weights that were rewritten."""
        result = copy.deepcopy(model)
        with torch.no_grad():
            for layer in sorted(self._rewritten):
                result.get_parameter(f"{layer}.weight").copy_(self.layer(layer).weight)
        return result

    def shortcut(self, node: str) -> Shortcut | None:
        """Return what a layer's output is added to, if nothing but a batch norm comes in between.

        Parameters
        ----------
        node : str
            The layer's call in the graph.
        """
        current, norm = self._nodes[node], None
        while len(current.users) == 1:
            (user,) = current.users
            if user.op == "call_module":
                module = self._modules[str(user.target)]
                if isinstance(module, _BatchNorm) and norm is None and module.running_var is not None:
                    norm = str(user.target)
                elif not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
                    return None
                current = user
            elif operation_name(user) == "add" and len(user.all_input_nodes) == 2 and not user.kwargs:
                return Shortcut(user.name, 1 - user.args.index(current), norm)
            else:
                return None
        return None


class FirstImages:
    """The first images of batches, to be gone through many times.

    Parameters
    ----------
    data : iterable of (images, labels)
    count : int
        How many to read.
    shape : tuple of int
        Of one image.

    Raises
    ------
    UserError
        If there are none, if they have another shape, or if they can be read only once.
    """

    def __init__(self, data: Batches | None, count: int, shape: tuple[int, ...]) -> None:
        if data is None or iter(data) is data:
            raise UserError(
                "data: must be batches of (images, labels) that can be read many times, e.g. a list of them"
            )
        self._data, self._count = data, count
        first = next(iter(self), None)
        if first is None:
            raise UserError("data: holds no images")
        if tuple(first.shape[1:]) != shape:
            sizes = [" x ".join(map(str, size)) for size in (first.shape[1:], shape)]
            raise UserError(f"data: its images are {sizes[0]}, but the network was analysed for {sizes[1]}")
        self.device = first.device

    def __iter__(self) -> Iterator[torch.Tensor]:
        remaining = self._count
        for batch in self._data:
            if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], torch.Tensor)):
                raise UserError(f"data: a batch must be a pair of images and labels, not a {type(batch).__name__}")
            images = batch[0]
            if len(images):
                yield images[:remaining]
            remaining -= len(images)
            if remaining <= 0:
                return


@dataclass(frozen=True)
class Places:
    """Places in a layer's output: for each the image of the batch, and the position in every spatial dimension."""

    image: torch.Tensor
    position: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.image)

    def pieces(self, values_per_place: int) -> Iterator[Places]:
        """Split them so that the values read at the places of one piece fit into memory."""
        size = max(1, _PIECE // values_per_place)
        for image, *position in zip(
            self.image.split(size), *(indexes.split(size) for indexes in self.position), strict=True
        ):
            yield Places(image, tuple(position))


def draw_places(
    layer: Any, inputs: torch.Tensor, per_image: int, generator: torch.Generator, *, distinct: bool = False
) -> Places:
    """Draw places in the output of a layer, the same number in every image, uniformly and with replacement.

    Parameters
    ----------
    layer : torch.nn.Module
        A convolution or linear layer.
    inputs : torch.Tensor
        What it reads: N x C x spatial dimensions; N x spatial dimensions x C for a linear layer.
    per_image : int
        Places per image.
    generator : torch.Generator
        On the CPU, so that the draw does not depend on the device.
    distinct : bool
        Take every place once if an image has no more than `per_image`.
    """
    size = _output_size(layer, inputs)
    count, images = math.prod(size), len(inputs)
    if distinct and count <= per_image:
        flat = torch.arange(count).repeat(images)
    else:
        flat = torch.randint(count, (images * per_image,), generator=generator)
    image = torch.arange(images).repeat_interleave(len(flat) // images)
    position = torch.unravel_index(flat, size)
    return Places(image.to(inputs.device), tuple(indexes.to(inputs.device) for indexes in position))


def read_patches(layer: Any, inputs: torch.Tensor, places: Places) -> torch.Tensor:
    """Return what a layer reads to compute its output at some places: n x C_in x K in float64.

    Parameters
    ----------
    layer, inputs
        As for `draw_places`.
    places : Places
        n of them.
    """
    if isinstance(layer, nn.Linear):
        patches = inputs[(places.image, *places.position)].unsqueeze(2)
    else:
        padded = _padded(layer, inputs)
        offsets = torch.cartesian_prod(*(torch.arange(size, device=inputs.device) for size in layer.kernel_size))
        index = [
            position[:, None] * stride + offset * dilation
            for position, stride, offset, dilation in zip(
                places.position,
                layer.stride,
                offsets.reshape(-1, len(layer.kernel_size)).T,
                layer.dilation,
                strict=True,
            )
        ]
        patches = padded.movedim(1, -1)[(places.image[:, None], *index)].transpose(1, 2)
    if selects(layer):
        patches = patches.index_select(1, layer.selected)
    return patches.double()


def read_outputs(layer: Any, values: torch.Tensor, places: Places) -> torch.Tensor:
    """Return values in the shape of a layer's output at some places: n x C_out in float64."""
    if not isinstance(layer, nn.Linear):
        values = values.movedim(1, -1)
    return values[(places.image, *places.position)].double()


def output_positions(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Return how many positions the output of each convolution and linear layer has per image.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    input_shape : tuple of int
        Of one image.
    """
    shapes = on_meta(model)
    graph = trace(shapes)
    values = infer_values(graph, shapes, (1, *input_shape))
    positions: dict[str, int] = {}
    for node, value in values.items():
        module = shapes.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            positions[str(node.target)] = positions.get(str(node.target), 0) + value.numel() // len(module.weight)
    return positions


def _padded(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    # The layer's own list: it has the two sides of padding="same" worked out.
    padding = layer._reversed_padding_repeated_twice
    if not any(padding):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, padding, mode)


def _output_size(layer: Any, inputs: torch.Tensor) -> tuple[int, ...]:
    """Return the spatial dimensions of a layer's output."""
    if isinstance(layer, nn.Linear):
        return tuple(inputs.shape[1:-1])
    padding = layer._reversed_padding_repeated_twice
    return tuple(
        (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
        for size, before, after, kernel, stride, dilation in zip(
            inputs.shape[2:],
            padding[-2::-2],
            padding[::-2],
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            strict=True,
        )
    )
