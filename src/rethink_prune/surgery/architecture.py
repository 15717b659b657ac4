"""The architecture: what is left of a network, as data, and what its masks and selections do to a network.

On disk it is JSON and tensors, never a pickle.

A mask holds single weights that are gone, in tensors that keep their shape. ``torch.nn.utils.prune`` is not used: it
renames the keys of the state dict, and a network that has it cannot be copied.

A selection lets a layer read some channels of a stream that stays whole for its other readers. It is a hook on the
layer, not a module of its own: class and weight names of the layer stay, and a subclass of batch norm keeps the
activation it may have. It selects by ``index_select`` from a buffer, which ``torch.compile`` follows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rethink_prune.errors import UserError

_FORMAT = "rethink-prune architecture 2"
# The attributes an architecture may set, by what they count. A file that names any other is not applied.
OUTPUT_WIDTHS = ("out_channels", "out_features", "num_features", "num_parameters", "normalized_shape")
INPUT_WIDTHS = ("in_channels", "in_features")
_ATTRIBUTES = (*OUTPUT_WIDTHS, *INPUT_WIDTHS, "groups", "padding")
# Attributes that hold several numbers.
_SHAPES = ("padding", "normalized_shape")
# The buffer with the channels that a module selects.
SELECTED = "selected"
# The fields that files have only where they are not empty.
_OPTIONAL = ("parameters", "exported")
# The fields that hold tensors. Files of earlier versions have no positions.
_POSITIONS = ("outputs", "inputs")
_TENSOR_FIELDS = ("selections", "masks", *_POSITIONS)
_SUFFIX = ".selected"

Masks = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """What is left of a network, relative to the network as its factory builds it. Empty: nothing is gone.

    Attributes
    ----------
    modules : mapping of str to mapping of str to value
        New attribute values of each changed module: ``{"conv1": {"out_channels": 14}, ...}``.
    edits : mapping of str to mapping
        New numbers for constants in the traced graph, by node name; see `cut`.
    selections : mapping of str to torch.Tensor
        For batch norms, convolutions and linear layers that read a stream which stays whole: the indexes of the
        channels they read, int64.
    removed : tuple of str
        Last modules of the residual branches that are gone; see `branches.remove_branches`.
    masks : mapping of str to torch.Tensor
        For parameters of which single weights are gone: True where a weight remains, in the parameter's shape.
    parameters : mapping of str to mapping of str to int
        New sizes of parameters that no layer owns, by dimension: ``{"cls_token": {"2": 96}}``.
    exported : tuple of int
        Where ``torch.export`` made the graph that the network runs: the shape of a batch of its images. Else empty.
    outputs, inputs : mapping of str to torch.Tensor
        Where the output and input channels of each changed module were in the unpruned network, int64, if that is
        known; what remains of a parameter under its name and dimension, as in ``cls_token/2``. Two architectures that
        differ in nothing else are equal: shapes and cost do not depend on it.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Architecture({"conv1": {"out_channels": 14}}, removed=("layer1.0.bn2",)).save(Path(folder))
    ...     Architecture.load(Path(folder)).removed
    ('layer1.0.bn2',)
    """

    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    selections: Mapping[str, torch.Tensor] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    exported: tuple[int, ...] = ()
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def has_positions(self) -> bool:
        """Whether it says which channels remain, so that other weights of the network can be cut like those pruned."""
        return bool(self.outputs or self.inputs) or not (self.modules or self.parameters)

    def without_positions(self) -> Architecture:
        """Return the same architecture of which it is not known which channels remain."""
        return replace(self, outputs={}, inputs={})

    def after(self, first: Architecture) -> Architecture:
        """Return what this architecture leaves of a network that an earlier one had left.

        Parameters
        ----------
        first : Architecture
            What the unpruned network was pruned to; this one is relative to that.

        Returns
        -------
        Architecture
            Relative to the unpruned network.

        Examples
        --------
        >>> first = Architecture({"0": {"out_features": 3}}, outputs={"0": torch.tensor([1, 4, 6])})
        >>> then = Architecture({"0": {"out_features": 2}}, outputs={"0": torch.tensor([0, 2])})
        >>> both = then.after(first)
        >>> both.modules, both.outputs
        ({'0': {'out_features': 2}}, {'0': tensor([1, 6])})
        """
        modules = {name: {**first.modules.get(name, {}), **values} for name, values in self.modules.items()}
        masks = {name: _join_masks(first, self, name) for name in {**first.masks, **self.masks}}
        sizes = {name: {**first.parameters.get(name, {}), **values} for name, values in self.parameters.items()}
        return Architecture(
            {**first.modules, **modules},
            {**first.edits, **self.edits},
            {**first.selections, **self.selections},
            tuple(dict.fromkeys((*first.removed, *self.removed))),
            masks,
            {**first.parameters, **sizes},
            first.exported or self.exported,
            _join_positions(first.outputs, self.outputs),
            _join_positions(first.inputs, self.inputs),
        )

    def save(self, folder: Path) -> None:
        """Write ``architecture.json``, and ``architecture.safetensors`` if it has tensors, into `folder`."""
        tables = {kind: getattr(self, kind) for kind in _TENSOR_FIELDS}
        content = {"format": _FORMAT, "modules": self.modules, "edits": self.edits, "removed": list(self.removed)}
        content |= {kind: getattr(self, kind) for kind in _OPTIONAL if getattr(self, kind)}
        names = {kind: sorted(table) for kind, table in tables.items() if table or kind not in _POSITIONS}
        text = json.dumps(content | names, sort_keys=True, indent=1)
        (folder / "architecture.json").write_text(text + "\n", encoding="utf-8")
        # safetensors refuses tensors that are not contiguous.
        tensors = {f"{kind}/{n}": t.cpu().contiguous() for kind, table in tables.items() for n, t in table.items()}
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
            modules, edits = content["modules"], content["edits"]
            # These decide attributes of modules and calls of the graph, so their form is checked before use.
            parameters = content.get("parameters", {})
            for table in (modules, edits, parameters):
                if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
                    raise ValueError("modules, edits and parameters must be tables")
            names = {kind: content[kind] for kind in _TENSOR_FIELDS if kind in content or kind not in _POSITIONS}
            tensors = load_file(folder / "architecture.safetensors") if any(names.values()) else {}
            tables = {kind: {n: tensors[f"{kind}/{n}"] for n in names[kind]} for kind in names}
            removed = tuple(map(str, content["removed"]))
            exported = tuple(map(int, content.get("exported", ())))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error!r}") from error
        return cls(modules, edits, removed=removed, parameters=parameters, exported=exported, **tables)

    def check_fits(self, model: nn.Module) -> None:
        """Check that this is an architecture of a network, given at full width.

        Raises
        ------
        UserError
            If it changes what the network does not have, or to more than its full width.

        Examples
        --------
        >>> Architecture({"0": {"out_features": 9}}).check_fits(nn.Sequential(nn.Linear(3, 8)))
        Traceback (most recent call last):
        rethink_prune.errors.UserError: 0.out_features=9: must be between 1 and 8, its full width
        """
        modules, network = dict(model.named_modules()), type(model).__name__
        for name, attributes in self.modules.items():
            for attribute, value in attributes.items():
                full = getattr(modules.get(name), attribute, None)
                if attribute not in _ATTRIBUTES or full is None:
                    raise UserError(f"{network}: has no {name}.{attribute}, which the architecture changes")
                if attribute not in _SHAPES and not (isinstance(value, int) and 1 <= value <= full):
                    raise UserError(f"{name}.{attribute}={value}: must be between 1 and {full}, its full width")
        tensors = named_tensors(model)
        for name, sizes in self.parameters.items():
            shape = tensors[name].shape if name in tensors else ()
            for dim, size in sizes.items():
                full = shape[int(dim)] if dim.isdigit() and int(dim) < len(shape) else 0
                if not (isinstance(size, int) and 1 <= size <= full):
                    raise UserError(
                        f"{name}: dimension {dim} of size {size}: must be between 1 and {full}, its full size"
                    )
        for name, positions in [*self.outputs.items(), *self.inputs.items()]:
            if "/" not in name:
                self._check_positions(name, positions, modules)
        unknown = [name for name in (*self.selections, *self.removed) if name not in modules]
        unknown += [name for name in self.masks if name not in dict(model.named_parameters())]
        if unknown:
            raise UserError(f"{network}: has no {unknown[0]}, which the architecture changes")

    def _check_positions(self, name: str, positions: torch.Tensor, modules: Mapping[str, nn.Module]) -> None:
        kind, widths = ("outputs", OUTPUT_WIDTHS) if positions is self.outputs.get(name) else ("inputs", INPUT_WIDTHS)
        full = next((width(getattr(modules[name], key)) for key in widths if hasattr(modules.get(name), key)), 0)
        kept = next((width(self.modules[name][key]) for key in widths if key in self.modules.get(name, {})), None)
        if len(positions) != kept or not (int(positions.min()) >= 0 and int(positions.max()) < full):
            raise UserError(f"{name}: its {kind} must be {kept} positions between 0 and {full - 1}")


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a network by name.

    Examples
    --------
    >>> list(named_tensors(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def width(value: Any) -> int:
    """Return how many channels an attribute counts, which may be the last number of a shape.

    Examples
    --------
    >>> width(12), width([12])
    (12, 12)
    """
    return int(value[-1] if isinstance(value, list | tuple) else value)


def _join_positions(first: Mapping[str, torch.Tensor], then: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**first, **{name: first[name][kept] if name in first else kept for name, kept in then.items()}}


def _join_masks(first: Architecture, then: Architecture, name: str) -> torch.Tensor:
    """Return the mask of a parameter after both, in its final shape."""
    earlier = first.masks.get(name)
    if earlier is None:
        return then.masks[name]
    module, _, kind = name.rpartition(".")
    for dim, positions in enumerate((then.outputs.get(module), then.inputs.get(module) if kind == "weight" else None)):
        if positions is not None:
            earlier = earlier.index_select(dim, positions)
    return earlier & then.masks[name] if name in then.masks else earlier


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> apply_masks(layer, {"weight": torch.tensor([[False, True]])})
    >>> layer.weight == 0
    tensor([[ True, False]])
    """
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


@torch.no_grad()
def draw_masked(model: nn.Module, masks: Masks, *, dense: bool = False) -> None:
    """Draw the masked convolutions anew at a density-scaled fan-out, and set their masked weights to zero.

    N(0, sqrt(2 / n)) with ``n`` = remaining weights / C_in, as Liu et al. (2019) do for networks of any family: with
    nothing masked, ``n`` is the fan-out ``k k C_out``. With `dense` it is that in any case, as in their lottery-ticket
    code for whole filters. Other masked parameters keep the values they have where they remain.

    Parameters
    ----------
    model : nn.Module
        Freshly initialised; changed in place. Draws from torch's global generator, in the order of the names.
    masks : mapping of str to torch.Tensor
        Each with at least one True.
    dense : bool
        Take all weights for the fan-out, those that are masked included.

    Examples
    --------
    >>> layer = nn.Conv2d(1, 1, 2, bias=False)
    >>> draw_masked(layer, {"weight": torch.tensor([[[[True, False], [True, True]]]])})
    >>> layer.weight != 0
    tensor([[[[ True, False],
              [ True,  True]]]])
    """
    # Sorted, because masks that were stored come back in another order, and each draw moves the generator on.
    for name in sorted(masks):
        parameter = model.get_parameter(name)
        if parameter.ndim > 2:
            fan_out = (parameter.numel() if dense else int(masks[name].sum())) / parameter.shape[1]
            nn.init.normal_(parameter, 0.0, math.sqrt(2.0 / fan_out))
    apply_masks(model, masks)


def select_inputs(module: nn.Module, indexes: torch.Tensor) -> None:
    """Make a module read only some channels of its input.

    The indexes become the buffer ``selected``, which is no part of the state dict: they belong to the architecture.

    Parameters
    ----------
    module : nn.Module
        A batch norm, convolution or linear layer for that many channels. Changed in place.
    indexes : torch.Tensor
        The channels (dimension 1) to read, in the order to read them: int64, shape ``(selected,)``.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> select_inputs(layer, torch.tensor([4, 0]))
    >>> layer(torch.zeros(1, 5)).shape
    torch.Size([1, 1])
    """
    # Pruned a second time, the module has the hook already.
    if not selects(module):
        module.register_forward_pre_hook(read_selected)
    module.register_buffer(SELECTED, indexes.to(torch.int64), persistent=False)


def selects(module: nn.Module) -> bool:
    """Tell whether `select_inputs` was applied to a module.

    Examples
    --------
    >>> selects(nn.Linear(2, 1))
    False
    """
    return read_selected in module._forward_pre_hooks.values()


def read_selected(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Replace a module's input by what it selects; the hook that `select_inputs` registers."""
    return (args[0].index_select(1, module.get_buffer(SELECTED)), *args[1:])


def selection_of(module: str) -> str:
    """Return the name of what a module selects from its input: that of the buffer with the indexes.

    Examples
    --------
    >>> selection_of("layer1.0.bn1")
    'layer1.0.bn1.selected'
    """
    return module + _SUFFIX


def selecting_module(name: str) -> str | None:
    """Return the module that a selection belongs to; None for the name of a layer.

    Examples
    --------
    >>> selecting_module("layer1.0.bn1.selected")
    'layer1.0.bn1'
    """
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None
