"""How each family of networks draws its weights.

An initialiser re-draws *every* parameter and resets every running statistic of a network, whatever its widths, from
torch's global generator, module by module in the order of ``model.modules()``. Scratch arms call it after surgery: a
slice of a wide layer's initialisation is not the initialisation of a narrow layer, because the standard deviation
depends on the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

Initialiser = Callable[[nn.Module], None]


def reset_parameters(model: nn.Module) -> None:
    """Let each module draw its weights as its own constructor does.

    Raises
    ------
    ValueError
        If a module holds parameters of its own and has no ``reset_parameters``.
    """
    for name, module in model.named_modules():
        _reset(module, name)


def cifar_resnet(model: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k k C_out))), batch norm 1 and 0, the rest as torch does (Liu et al. 2019)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            _normal(module, _he_fan_out(module))
        else:
            _reset(module, name)


def cifar_vgg(model: nn.Module) -> None:
    """As :func:`cifar_resnet`, with 2-D batch norm gamma 0.5, linear layers N(0, 0.01), zero biases."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            _normal(module, _he_fan_out(module))
        elif isinstance(module, nn.Linear):
            _normal(module, 0.01)
        else:
            _reset(module, name)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)


def torchvision_resnet(model: nn.Module) -> None:
    """Convolutions Kaiming normal over fan-out, everything else as torch does."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            _reset(module, name)


def torchvision_vgg(model: nn.Module) -> None:
    """As :func:`torchvision_resnet`, with linear layers N(0, 0.01) and zero biases."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _normal(module, 0.01)
        else:
            _reset(module, name)


INITIALISERS: Mapping[str, Initialiser] = {
    "cifar_resnet": cifar_resnet,
    "cifar_vgg": cifar_vgg,
    "torchvision_resnet": torchvision_resnet,
    "torchvision_vgg": torchvision_vgg,
    "reset_parameters": reset_parameters,
}

# Where the class of a network lives tells its family.
_FAMILIES: Mapping[str, str] = {
    "rethink_prune.models.resnet": "cifar_resnet",
    "rethink_prune.models.vgg": "cifar_vgg",
    "torchvision.models.resnet": "torchvision_resnet",
    "torchvision.models.vgg": "torchvision_vgg",
}


def family_initialiser(model: nn.Module) -> str | None:
    """Return the name of the initialiser of `model`'s family, or None if the family is not known."""
    return _FAMILIES.get(type(model).__module__)


def _he_fan_out(conv: nn.Conv2d) -> float:
    # He et al. 2015 (arXiv:1502.01852) over the output side, the standard deviation of the paper's CIFAR networks.
    return math.sqrt(2.0 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))


def _normal(module: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(module.weight, 0.0, std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _reset(module: nn.Module, name: str) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    elif any(True for _ in module.parameters(recurse=False)):
        raise ValueError(f"{name or 'the network'} ({type(module).__name__}) has no reset_parameters()")
