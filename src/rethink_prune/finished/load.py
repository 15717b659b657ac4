"""Networks from finished stages, and the weights a user brings along.

Nothing here executes code from a file: safetensors, JSON, YAML's safe subset, and torch files with
``weights_only=True``.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.store.stages import Stage, load_stage_weights
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

TORCHVISION = "torchvision:"


def load_model(folder: str | Path, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Rebuild the network of a finished stage.

    Parameters
    ----------
    folder : path
        The stage's folder, ``STORE/stages/<kind>-<key>``, or a copy that ``rethink_prune.export`` made of it.
    factory : callable, optional
        Builds the unpruned network, called as ``factory(num_classes=..., **options)``; it also gets ``in_channels`` if
        it has such a parameter. Needed for a network of your own: a stage never says what to import.

    Returns
    -------
    torch.nn.Module
        On the CPU, in evaluation mode.

    Raises
    ------
    UserError
        If the folder holds no finished, intact stage, or a factory is needed and missing, or builds another network.
    """
    stage = Stage(Path(folder))
    stage.finished()
    model = reshape(build_unpruned(stage, factory), Architecture.load(stage.folder))
    try:
        model.load_state_dict(load_stage_weights(stage))
    except RuntimeError as error:
        raise UserError(f"{folder}: holds other weights than {type(model).__name__} has: {_one_line(error)}") from None
    return model.eval()


def build_unpruned(stage: Stage, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Build the network that a stage's was pruned from, with arbitrary weights; arguments as for `load_model`."""
    network = read_config(stage)["network"]
    name, options = network["name"], network["options"]
    sizes = {"num_classes": network["num_classes"], "in_channels": network["in_channels"]}
    if factory is None:
        if ":" in name:
            raise UserError(
                f"{stage.folder}: holds {name}, a network of your own; say what builds it: "
                "load_model(folder, factory=...), or --factory path.to.module:factory on the command line"
            )
        return build_model(name, **sizes, **options)
    try:
        if "in_channels" not in inspect.signature(factory).parameters:
            del sizes["in_channels"]
        model = factory(**sizes, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{stage.folder}: the factory failed with {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{stage.folder}: the factory gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def read_config(stage: Stage) -> dict[str, Any]:
    """Return what a stage says about itself.

    Returns
    -------
    dict
        ``network`` has name, options, num_classes, in_channels and image_size of the unpruned network; ``images``, if
        it is there, ``mean`` and ``std`` per channel, by which images were normalised.

    Raises
    ------
    UserError
        If it does not describe a network.
    """
    path = stage.folder / "config.yaml"
    kinds = {"name": str, "options": dict, "num_classes": int, "in_channels": int, "image_size": int}
    try:
        config = yaml.safe_load(path.read_text())
        if all(isinstance(config["network"][name], kind) for name, kind in kinds.items()):
            return config
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: is damaged or of another version: it describes no network")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
