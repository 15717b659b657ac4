"""Networks by name, or by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from rethink_prune.errors import UserError
from rethink_prune.imports import import_object
from rethink_prune.models.densenet import DenseNet
from rethink_prune.models.preact_resnet import PreActResNet
from rethink_prune.models.preresnet import PreResNet
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import LAYERS, VGG
from rethink_prune.models.vgg_imagenet import VGG16GAP, VGG11BatchNorm1d

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    **{name: partial(VGG, layers) for name, layers in LAYERS.items()},
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"preresnet{depth}": partial(PreResNet, depth) for depth in (*range(20, 111, 9), 164)},
    "densenet40": partial(DenseNet, 40),
    "densenet_bc100": partial(DenseNet, 100, bottleneck=True, compression=0.5),
    "resnext29": partial(ResNeXt, 29),
    # For ImageNet; the others are torchvision's.
    "vgg16_gap": VGG16GAP,
    "vgg11_bn1d": VGG11BatchNorm1d,
    "preact_resnet50": partial(PreActResNet, (3, 4, 6, 3)),
}

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def model_factory(name: str) -> Callable[..., nn.Module]:
    """Return what builds the network `name`: an entry of :data:`MODELS`, or the import path ``module:factory``.

    Raises
    ------
    UserError
        If there is no such network.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" in name:
        factory = import_object(name, "model.name")
        assert callable(factory)
        return factory
    raise UserError(
        f"model.name={name}: no such network; one of {', '.join(MODELS)}, or your own as path.to.module:factory"
    )


def build_model(name: str, *, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a network with freshly drawn weights.

    Parameters
    ----------
    name : str
        One of :data:`MODELS`, e.g. ``"vgg16"`` or ``"resnet56"``, or ``"path.to.module:factory"``. A factory is
        called as ``factory(num_classes=..., **options)``; it also gets ``in_channels`` if it has such a parameter.
    num_classes : int
        Number of outputs.
    in_channels : int
        Channels of the input image.
    **options
        Options of the network, e.g. ``detach_shortcut=True`` for the CIFAR ResNets, ``head="linear"`` for VGG.

    Returns
    -------
    torch.nn.Module
        Takes N x in_channels x H x W, gives logits N x num_classes.

    Raises
    ------
    UserError
        If the name is unknown, the network does not take an option or its value, or the factory gives no
        ``nn.Module``.

    Examples
    --------
    >>> sum(p.numel() for p in build_model("resnet56").parameters())
    853018
    """
    factory = model_factory(name)
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option, value in options.items():
        if option not in parameters and not takes_any:
            known = sorted(set(parameters) - {"num_classes", "in_channels"}) or ["none"]
            raise UserError(f"model.{option}: {name} has no such option; it has: {', '.join(known)}")
        if name in MODELS:
            _check_kind(option, value, type(parameters[option].default))
    if "in_channels" in parameters:
        options["in_channels"] = in_channels
    try:
        model = factory(num_classes=num_classes, **options)
    except Exception as error:
        if name in MODELS and isinstance(error, ValueError):  # says which option cannot have its value
            raise UserError(f"model.{error}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"model.name={name}: building it with num_classes={num_classes} failed with {reason} "
            "(HYDRA_FULL_ERROR=1 shows where)"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={name}: gave a {type(model).__name__}, not a torch.nn.Module")
    model.network_name = name  # type: ignore[assignment]  # published variants are looked up by it
    return model


def asked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that `name` lacks and that ask for nothing.

    A configuration for one of our networks lists its options with their defaults; with the name of another network put
    over it, these are left out, while a value that someone chose stays, for `build_model` to refuse.
    """
    own = inspect.signature(model_factory(name)).parameters
    defaults: dict[str, list[Any]] = {}
    for factory in MODELS.values():
        for option, parameter in inspect.signature(factory).parameters.items():
            defaults.setdefault(option, []).append(parameter.default)
    return {
        option: value
        for option, value in options.items()
        if (option in own and name in MODELS) or value not in defaults.get(option, [])
    }


def _check_kind(option: str, value: object, kind: type) -> None:
    """Refuse a value that is not of the kind of the option's default: the text "false", say, would count as true."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"model.{option}={value}: must be {_KINDS[kind]}")
