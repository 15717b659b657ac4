"""How each family of networks draws its weights.

An initialiser re-draws *every* parameter and resets every running statistic of a network, whatever its widths, from
torch's global generator, module by module in the order of ``model.modules()``. Scratch arms call it after surgery: a
slice of a wide layer's initialisation is not the initialisation of a narrow layer, because the standard deviation
depends on the width.

Except where an initialiser says otherwise, batch norms start at gamma 1 and beta 0.
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
    _draw(model, conv_std=_he_fan_out)


def cifar_resnet_half_gamma(model: nn.Module) -> None:
    """As :func:`cifar_resnet`, with batch norm gamma 0.5: PreResNet and DenseNet of Network Slimming."""
    _draw(model, conv_std=_he_fan_out)
    _halve_gammas(model, nn.BatchNorm2d)


def cifar_vgg(model: nn.Module) -> None:
    """As :func:`cifar_resnet`, with 2-D batch norm gamma 0.5, linear layers N(0, 0.01), zero biases."""
    _draw(model, conv_std=_he_fan_out, linear_std=lambda _: 0.01)
    _halve_gammas(model, nn.BatchNorm2d)


def cifar_vgg_fan_in(model: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k k C_in))), linear layers N(0, 0.01), zero biases: VGG of the unstructured study."""
    _draw(model, conv_std=_he_fan_in, linear_std=lambda _: 0.01)


def slimming_vgg(model: nn.Module) -> None:
    """As :func:`cifar_vgg`, with gamma 0.5 in 1-D batch norm too: VGG-11 of Network Slimming on ImageNet."""
    _draw(model, conv_std=_he_fan_out, linear_std=lambda _: 0.01)
    _halve_gammas(model, nn.BatchNorm1d, nn.BatchNorm2d)


def kaiming_fan_in(model: nn.Module) -> None:
    """Convolutions and linear layers N(0, sqrt(2 / fan-in)), zero biases: Sparse Structure Selection."""
    _draw(model, conv_std=_he_fan_in, linear_std=lambda linear: math.sqrt(2.0 / linear.in_features))


def torchvision_resnet(model: nn.Module) -> None:
    """Convolutions Kaiming normal over fan-out, everything else as torch does."""
    _draw(model, conv_std=_he_fan_out)


def torchvision_vgg(model: nn.Module) -> None:
    """As :func:`torchvision_resnet`, with linear layers N(0, 0.01) and zero biases."""
    _draw(model, conv_std=_he_fan_out, linear_std=lambda _: 0.01)


INITIALISERS: Mapping[str, Initialiser] = {
    "cifar_resnet": cifar_resnet,
    "cifar_resnet_half_gamma": cifar_resnet_half_gamma,
    "cifar_vgg": cifar_vgg,
    "cifar_vgg_fan_in": cifar_vgg_fan_in,
    "slimming_vgg": slimming_vgg,
    "kaiming_fan_in": kaiming_fan_in,
    "torchvision_resnet": torchvision_resnet,
    "torchvision_vgg": torchvision_vgg,
    "reset_parameters": reset_parameters,
}

# Where the class of a network lives tells its family.
_FAMILIES: Mapping[str, str] = {
    "rethink_prune.models.resnet": "cifar_resnet",
    "rethink_prune.models.preresnet": "cifar_resnet",
    "rethink_prune.models.densenet": "cifar_resnet",
    "rethink_prune.models.resnext": "cifar_resnet",
    "rethink_prune.models.vgg": "cifar_vgg",
    "rethink_prune.models.vgg_imagenet": "slimming_vgg",  # VGG-16-GAP, without batch norm, has no gamma to halve
    "rethink_prune.models.preact_resnet": "kaiming_fan_in",
    "torchvision.models.resnet": "torchvision_resnet",
    "torchvision.models.vgg": "torchvision_vgg",
    "torchvision.models.mobilenetv2": "torchvision_vgg",
    "torchvision.models.mobilenetv3": "torchvision_vgg",
}


def family_initialiser(model: nn.Module) -> str | None:
    """Return the name of the initialiser of `model`'s family, or None if the family is not known."""
    return _FAMILIES.get(type(model).__module__)


def _draw(
    model: nn.Module,
    *,
    conv_std: Callable[[nn.Conv2d], float],
    linear_std: Callable[[nn.Linear], float] | None = None,
) -> None:
    """Draw normal weights and zero biases; what has no standard deviation here resets itself."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            _normal(module, conv_std(module))
        elif isinstance(module, nn.Linear) and linear_std is not None:
            _normal(module, linear_std(module))
        else:
            _reset(module, name)


def _halve_gammas(model: nn.Module, *kinds: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            nn.init.constant_(module.weight, 0.5)


# He et al. 2015 (arXiv:1502.01852) over the output side is the standard deviation of the paper's networks. Fan-out
# follows torch, which does not divide it by the groups of a convolution.
def _he_fan_out(conv: nn.Conv2d) -> float:
    return math.sqrt(2.0 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))


def _he_fan_in(conv: nn.Conv2d) -> float:
    return math.sqrt(2.0 / conv.weight[0].numel())


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
