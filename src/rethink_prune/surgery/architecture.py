"""The architecture: what is left of a network, as data. JSON and tensors on disk, never a pickle."""

from __future__ import annotations

import json
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
# The fields that hold tensors.
_TENSOR_FIELDS = ("selections", "masks")


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
