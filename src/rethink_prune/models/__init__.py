"""Networks by name, or by import path.

A family of networks is one file in this folder. Its ``NETWORKS`` maps names to what builds them, and the class of its
networks names the initialiser in its attribute ``initialiser``. Beside the file, a network needs a configuration in
``conf/model/``.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rethink_prune.errors import UserError
from rethink_prune.imports import find_named

Factory = Callable[..., nn.Module]


def _collect_networks() -> dict[str, Factory]:
    files = [importlib.import_module(file.name) for file in pkgutil.iter_modules(__path__, f"{__name__}.")]
    # Files that hold no family, such as blocks.py, have no NETWORKS.
    return {name: factory for file in files for name, factory in getattr(file, "NETWORKS", {}).items()}


# In the order of the files' names.
MODELS: Mapping[str, Factory] = _collect_networks()

# What torch.compile and data parallelism give.
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def model_factory(name: str) -> Factory:
    """Return what builds the network `name`: an entry of :data:`MODELS`, or the import path ``module:factory``.

    Raises
    ------
    UserError
        If there is no such network.

    Examples
    --------
    >>> model_factory("resnet20").func.__name__
    'ResNet'
    >>> model_factory("torch.nn:Identity")
    <class 'torch.nn.modules.linear.Identity'>
    """
    return find_named(name, MODELS, "model.name", what="network", form="factory")


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
        ``nn.Module``, or one that is wrapped, or not initialised yet.

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
            kind = type(parameters[option].default)
            # The text "false" would count as true. A whole number may stand for a float, but true and false may not.
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"model.{option}={value}: must be {_KINDS[kind]}")
    # A network of the user's own may take images of one kind only, and has no such parameter then.
    if "in_channels" in parameters:
        options["in_channels"] = in_channels
    try:
        model = factory(num_classes=num_classes, **options)
    # The user's factory may raise anything.
    except Exception as error:
        if name in MODELS and isinstance(error, ValueError):
            # Our networks' messages begin with the option whose value is wrong.
            raise UserError(f"model.{error}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        problem = f"building it with num_classes={num_classes} failed with {reason}"
        raise UserError(f"model.name={name}: {problem} (HYDRA_FULL_ERROR=1 shows where)") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={name}: gave a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ in _WRAPPERS:
        raise UserError(f"model.name={name}: gave a {type(model).__name__} around a network; return the network itself")
    if lazy := next((key for key, parameter in model.named_parameters() if is_lazy(parameter)), None):
        raise UserError(f"model.name={name}: {lazy} has no shape yet; run the network once before it is returned")
    # The published variants of a pruner are looked up by this name.
    model.network_name = name  # type: ignore[assignment]
    return model


def takes_image_size(name: str) -> bool:
    """Tell whether a network is built for images of one size: its factory has a parameter ``image_size``.

    Examples
    --------
    >>> takes_image_size("vit_tiny"), takes_image_size("resnet20")
    (True, False)
    """
    return "image_size" in inspect.signature(model_factory(name)).parameters


def asked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that `name` lacks and that ask for nothing.

    A configuration lists a network's options with their defaults. If its name is then replaced by that of another
    network, options at their defaults are left out. A value that someone chose stays, for `build_model` to refuse.

    Examples
    --------
    >>> asked_options("vgg16", {"head": "mlp", "detach_shortcut": False})
    {'head': 'mlp'}
    >>> asked_options("vgg16", {"detach_shortcut": True})
    {'detach_shortcut': True}
    """
    factory = model_factory(name)
    own = inspect.signature(factory).parameters if name in MODELS else {}
    signatures = map(inspect.signature, MODELS.values())
    # A list, not a set: a value that someone chose need not be hashable.
    defaults = [(option, p.default) for signature in signatures for option, p in signature.parameters.items()]
    return {option: value for option, value in options.items() if option in own or (option, value) not in defaults}
