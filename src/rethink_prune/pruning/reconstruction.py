"""Pruners that go from layer to layer: choose channels by images, then repair the layers that read them.

They prune a copy of the network in place, and sample a later layer through the part that is already pruned. The images
run anew for every layer and only up to it: memory depends on the batch, not on how many images there are.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.copying import copy_network
from rethink_prune.pruning.channel_pruner import OF_TOKENS, ChannelTarget, Channelwise, Choice
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.pruning.samples import FirstImages, Layer
from rethink_prune.surgery.channels import ChannelGroup, Channels
from rethink_prune.surgery.exported import Graphs
from rethink_prune.surgery.graph import keep_constants, layer_calls, operation_name, trace

# Channels of a batch norm that scales them by less than this share of its largest scale do not make up for a shortcut's
# error: they would have to grow a hundredfold.
_SMALL_SCALE = 0.01


@dataclass(frozen=True)
class ChannelReader:
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
        The unit that each of `columns` belongs to. A unit has one column as a rule; several after a flatten, and where
        it is a head.
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
    graphs : Graphs, optional
        What the network runs, where ``torch.fx`` alone cannot trace it.
    """

    def __init__(self, model: nn.Module, device: torch.device, graphs: Graphs | None = None) -> None:
        network = copy_network(model).to(device)
        # Up to twice as fast on a CPU.
        self._channels_last = all(parameter.ndim < 5 for parameter in network.parameters())
        if self._channels_last:
            network.to(memory_format=torch.channels_last)
        if graphs is not None and graphs.exported:
            graph = graphs.evaluation
            keep_constants(network.eval(), graphs.network, graph).to(device)
        else:
            graph = trace(network)
        super().__init__(network, graph=graph)
        self.device = device
        self._nodes = {node.name: node for node in self.graph.nodes}
        self._dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        # Only these are copied back: masks and the memory format stay in this copy.
        self._rewritten: set[str] = set()

    def readers(self, channels: Channels, group: ChannelGroup) -> list[ChannelReader]:
        """Return the layers that read a group's channels; layers with one weight in common count as one."""
        readers: dict[int, ChannelReader] = {}
        for layer, positions in channels.inputs(group).items():
            # By identity: layers that share a weight have to be fitted together.
            weight = self.layer(layer).weight
            sharing = [name for name, module in self.submodules.items() if getattr(module, "weight", None) is weight]
            calls = {node for name in sharing for node in layer_calls(self.graph, name)}
            nodes = tuple(node.name for node in self.graph.nodes if node in calls)
            if nodes:  # a head for training only is not called
                columns = [position for unit in positions for position in unit]
                units = [index for index, unit in enumerate(positions) for _ in unit]
                tables = torch.tensor([columns, units], device=self.device)
                readers.setdefault(id(weight), ChannelReader(layer, nodes, *tables))
        return list(readers.values())

    def layer(self, name: str) -> Layer:
        """Return a convolution or linear layer of the copy."""
        layer: Layer = self.submodules[name]
        return layer

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
        images = images.to(self.device, self._dtype)
        if self._channels_last and images.ndim == 4:
            try:
                return self._read(nodes, images.contiguous(memory_format=torch.channels_last))
            except RuntimeError:
                # Some networks (x.view) take no such images; any other reason is raised again below.
                self._channels_last = False
                self.module.to(memory_format=torch.contiguous_format)
        return self._read(nodes, images.contiguous())

    def _read(self, nodes: Collection[str], images: torch.Tensor) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        self.args_iter = iter([images])
        for node in self.graph.nodes:
            if node.name in nodes:
                args, _ = self.fetch_args_kwargs_from_env(node)
                found[node.name] = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
                if len(found) == len(nodes):
                    break  # what follows the last one is not needed
            self.env[node] = self.run_node(node)
            # As the interpreter's own loop does: values nobody reads any more make room.
            for used_up in self.user_to_last_uses.get(node, ()):
                del self.env[used_up]
        self.env.clear()
        return found

    def weight(self, layer: str) -> torch.Tensor:
        """Return a copy of a layer's weight as C_out x C_in x K in float64, K the kernel's size (1 if linear)."""
        weight = self.layer(layer).weight.detach().double()
        return weight.reshape(*weight.shape[:2], -1).clone()

    def bias(self, layer: str) -> torch.Tensor | None:
        """Return a copy of a layer's bias in float64, if it has one."""
        bias = self.layer(layer).bias
        return None if bias is None else bias.detach().double().clone()

    def rewrite(self, layer: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Write back what :meth:`weight` and :meth:`bias` gave, changed."""
        # Detached, they share the parameter's memory, and autograd does not record the copy.
        parameter = self.layer(layer).weight.detach()
        parameter.copy_(weight.reshape(parameter.shape))
        self._rewritten.add(f"{layer}.weight")
        if bias is not None:
            self.submodules[layer].bias.detach().copy_(bias)
            self._rewritten.add(f"{layer}.bias")

    def remove(self, group: ChannelGroup, dropped: Sequence[int], readers: Sequence[ChannelReader]) -> None:
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
                module = self.submodules[name]
                if isinstance(module, nn.MultiheadAttention):
                    tensors = [module.in_proj_weight, module.in_proj_bias]
                elif module.weight is not None:
                    tensors = [module.weight, module.bias]
                else:
                    tensors = [module.running_mean]  # a norm without scale and shift
                for tensor in tensors:
                    if isinstance(tensor, torch.Tensor):
                        tensor.detach()[list(positions)] = 0

    def rewritten(self, model: nn.Module) -> nn.Module:
        """Return a copy of `model`, which this was made of, with the weights that were rewritten."""
        result = copy_network(model)
        with torch.no_grad():
            for name in sorted(self._rewritten):
                result.get_parameter(name).copy_(self.module.get_parameter(name))
        return result

    def shortcut(self, node: str) -> Shortcut | None:
        """Return what a layer's output is added to, if nothing but a batch norm or dropout comes in between.

        Parameters
        ----------
        node : str
            The layer's call in the graph.
        """
        current, norm = self._nodes[node], None
        while len(current.users) == 1:
            (user,) = current.users
            if user.op == "call_module":
                module = self.submodules[str(user.target)]
                if isinstance(module, _BatchNorm) and norm is None and module.running_var is not None:
                    norm = str(user.target)
                elif not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
                    return None
                current = user
            elif operation_name(user) == "stochastic_depth":  # of torchvision: in evaluation mode, it does nothing
                current = user
            elif operation_name(user) == "add" and len(user.all_input_nodes) == 2 and not user.kwargs:
                return Shortcut(user.name, 1 - user.args.index(current), norm)
            else:
                return None
        return None

    def gain(self, shortcut: Shortcut, channels: int) -> torch.Tensor:
        """Return by how much a layer's output channels change for a change of one after the batch norm that follows."""
        gain = torch.ones(channels, dtype=torch.float64, device=self.device)
        if shortcut.norm is not None:
            norm = self.submodules[shortcut.norm]
            # In evaluation mode, a batch norm is this scale and a shift.
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                scale *= norm.weight.detach().double()
            usable = scale.abs() > _SMALL_SCALE * scale.abs().max()
            gain = torch.where(usable, 1 / scale, 0.0)
        return gain


class SamplingOptions(ChannelOptions):
    """Options of a channel pruner that samples images; it goes layer by layer, so it has no global ranking.

    Without `images`, it samples as many as its publication did, as far as there are so many.
    """

    ranking: Literal["layer"] = "layer"
    images: Count | None = None


@dataclass(frozen=True)
class Reconstruction:
    """One network on its way to fewer channels: the copy that is pruned, and what its layers are sampled with."""

    model: nn.Module
    current: WorkingCopy
    images: FirstImages
    generator: torch.Generator
    graphs: Graphs | None = None

    @cached_property
    def original(self) -> WorkingCopy:
        """A copy that stays as it is; made where it is asked for, because it takes memory."""
        return WorkingCopy(self.model, self.images.device, self.graphs)


AnySamplingOptions = TypeVar("AnySamplingOptions", bound=SamplingOptions)


class ReconstructionPruner(Channelwise[AnySamplingOptions]):
    """Removes channels layer by layer, and repairs what reads them; a subclass defines :meth:`rewrite_readers`.

    Attributes
    ----------
    published_images : int
        How many training images the publication samples.
    """

    needs_data = True
    published_images: ClassVar[int]

    def find_groups(self, model: nn.Module, channels: Channels) -> tuple[tuple[ChannelGroup, ...], Collection[str]]:
        """Return the groups whose readers can be sampled: hidden units and heads need a layer that evaluation runs."""
        groups, masked = super().find_groups(model, channels)
        sampled = (group for group in groups if group.kind not in OF_TOKENS or _is_read(channels, group))
        return tuple(sampled), masked

    @property
    def images(self) -> int:
        """How many training images are sampled, if there are so many."""
        return self.options.images or self.published_images

    def sampled(self, data: Batches, target: ChannelTarget) -> FirstImages:
        """Return the images to sample from; raise `UserError` if there are none, or of another shape."""
        return FirstImages(data, self.images, target.input_shape)

    @abstractmethod
    def rewrite_readers(
        self, run: Reconstruction, group: ChannelGroup, width: int, readers: Sequence[ChannelReader]
    ) -> list[int]:
        """Choose the units of a group to drop, and rewrite the weights of its readers for the units that stay.

        Parameters
        ----------
        run : Reconstruction
            The weights of ``run.current`` are rewritten.
        group : ChannelGroup
        width : int
            How many units stay.
        readers : sequence of ChannelReader
            The layers that read the group's channels.

        Returns
        -------
        list of int
            The units to drop, in ascending order.
        """

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Go through the layers, then cut.

        Raises
        ------
        UserError
            If there are too few images, or if weights or activations are not finite.
        """
        images = self.sampled(data, target)
        reconstructed, drop = self.reconstruct(model, target, images, generator=generator)
        warnings: tuple[str, ...] = ()
        if self.options.images is None and images.read < self.published_images:
            published = f"its publication sampled {self.published_images:,}"
            warnings = (f"pruner.images: {self.options.name} sampled all {images.read:,} training images; {published}",)
        return target.cut(reconstructed, Choice(drop, warnings))

    def reconstruct(
        self, model: nn.Module, target: ChannelTarget, images: FirstImages, *, generator: torch.Generator
    ) -> tuple[nn.Module, dict[str, list[int]]]:
        """Return a copy of `model` at full width with rewritten weights, and the units to drop of each group."""
        graphs = target.channels.graphs
        run = Reconstruction(model, WorkingCopy(model, images.device, graphs), images, generator, graphs)
        drop: dict[str, list[int]] = {}
        for group, width in target.narrowed():
            readers = run.current.readers(target.channels, group)
            drop[group.name] = self.rewrite_readers(run, group, width, readers)
            # Masked at once: the next layer is sampled through what is left.
            run.current.remove(group, drop[group.name], readers)
        return run.current.rewritten(model), drop

    def limit_on_images(self, available: int) -> str:
        """Return what keeps the sample from having more images, for error messages."""
        return "pruner.images" if available >= self.images else "the number of training images"


def _is_read(channels: Channels, group: ChannelGroup) -> bool:
    """Tell whether evaluation runs a layer that reads the group, so that what it reads can be sampled."""
    return any(channels.output_shape(layer) is not None for layer in channels.inputs(group))
