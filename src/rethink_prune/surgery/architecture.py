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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rethink_prune.errors import UserError

_FORMAT = "rethink-prune architecture 2"
# The attributes an architecture may set, by what they count. A file that names any other is not applied.
OUTPUT_WIDTHS = ("out_channels", "out_features", "num_features", "num_parameters")
INPUT_WIDTHS = ("in_channels", "in_features")
_ATTRIBUTES = (*OUTPUT_WIDTHS, *INPUT_WIDTHS, "groups", "padding")
# The buffer with the channels that a module selects.
SELECTED = "selected"
# The fields that hold tensors.
_TENSOR_FIELDS = ("selections", "masks")
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

    def save(self, folder: Path) -> None:
        """Write ``architecture.json``, and ``architecture.safetensors`` if it has tensors, into `folder`."""
        tables = {kind: getattr(self, kind) for kind in _TENSOR_FIELDS}
        content = {"format": _FORMAT, "modules": self.modules, "edits": self.edits, "removed": list(self.removed)}
        text = json.dumps(content | {kind: sorted(tables[kind]) for kind in tables}, sort_keys=True, indent=1)
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
            for table in (modules, edits):
                if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
                    raise ValueError("modules and edits must be tables")
            names = content["selections"] + content["masks"]
            tensors = load_file(folder / "architecture.safetensors") if names else {}
            selections, masks = ({n: tensors[f"{kind}/{n}"] for n in content[kind]} for kind in _TENSOR_FIELDS)
            removed = tuple(map(str, content["removed"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error!r}") from error
        return cls(modules, edits, selections, removed, masks)

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
                if attribute != "padding" and not (isinstance(value, int) and 1 <= value <= full):
                    raise UserError(f"{name}.{attribute}={value}: must be between 1 and {full}, its full width")
        unknown = [name for name in (*self.selections, *self.removed) if name not in modules]
        unknown += [name for name in self.masks if name not in dict(model.named_parameters())]
        if unknown:
            raise UserError(f"{network}: has no {unknown[0]}, which the architecture changes")


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
def draw_masked(model: nn.Module, masks: Masks) -> None:
    """Draw the masked convolutions anew at a density-scaled fan-out, and set their masked weights to zero.

    N(0, sqrt(2 / n)) with ``n`` = remaining weights / C_in, as Liu et al. (2019) do for networks of any family: with
    nothing masked, ``n`` is the fan-out ``k k C_out``. Other masked parameters keep the values they have where they
    remain.

    Parameters
    ----------
    model : nn.Module
        Freshly initialised; changed in place. Draws from torch's global generator, in the order of the names.
    masks : mapping of str to torch.Tensor
        Each with at least one True.

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
            fan_out = int(masks[name].sum()) / parameter.shape[1]
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
