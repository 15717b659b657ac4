"""How each family of networks draws its weights.

An initialiser draws *every* parameter of a network anew, whatever its widths, and resets every running statistic. It
uses torch's global generator, module by module in the order of ``model.modules()``. Scratch arms call it after surgery:
the standard deviation depends on the width, so a slice of a wide layer's weights is not the initialisation of a narrow
layer.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from rethink_prune.imports import find_named

Layer = nn.Conv2d | nn.Linear
Std = Callable[[Layer], float]


def he_fan_out(layer: Layer) -> float:
    """Return ``sqrt(2 / fan-out)``: He et al. 2015 (arXiv:1502.01852) over the output side.

    Examples
    --------
    >>> he_fan_out(nn.Conv2d(4, 8, kernel_size=2))
    0.25
    """
    # The kernel's size times all output channels. As in torch, the groups of a convolution do not divide it.
    return math.sqrt(2.0 / (layer.weight[0, 0].numel() * layer.weight.shape[0]))


def he_fan_in(layer: Layer) -> float:
    """Return ``sqrt(2 / fan-in)``; in a grouped convolution the fan-in is that of one group.

    Examples
    --------
    >>> he_fan_in(nn.Linear(32, 5))
    0.25
    """
    return math.sqrt(2.0 / layer.weight[0].numel())


def _one_hundredth(layer: Layer) -> float:
    return 0.01


def draw_weights(
    model: nn.Module,
    *,
    conv_std: Std | None = None,
    linear_std: Std | None = None,
    half_gamma: tuple[type[nn.Module], ...] = (),
) -> None:
    """Draw normal weights and zero biases; let every other module reset itself, as its constructor does.

    Parameters
    ----------
    conv_std, linear_std : callable, optional
        Give the standard deviation of a 2-D convolution, of a linear layer; without it they reset themselves too.
    half_gamma : tuple of types
        Kinds of batch norm whose gamma starts at 0.5. All others start at 1.

    Raises
    ------
    ValueError
        If a module holds parameters of its own and has no ``reset_parameters``.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    >>> draw_weights(model, conv_std=he_fan_out, half_gamma=(nn.BatchNorm2d,))
    >>> model[0].bias.tolist(), model[1].weight.tolist()
    ([0.0, 0.0], [0.5, 0.5])
    """
    # All draws come from one generator: another order of modules would give other weights for the same seed.
    for name, module in model.named_modules():
        std = conv_std if isinstance(module, nn.Conv2d) else linear_std
        if isinstance(module, Layer) and std is not None:
            nn.init.normal_(module.weight, 0.0, std(module))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        # Only the module's own parameters: those of its children are drawn when their turn comes.
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"{name or 'the network'} ({type(module).__name__}) has no reset_parameters()")
        if isinstance(module, half_gamma):
            nn.init.constant_(module.get_parameter("weight"), 0.5)


_draw_as_vgg = partial(draw_weights, conv_std=he_fan_out, linear_std=_one_hundredth)

INITIALISERS: Mapping[str, Callable[[nn.Module], None]] = {
    # Liu et al. 2019 (arXiv:1810.05270) for CIFAR.
    "cifar_resnet": partial(draw_weights, conv_std=he_fan_out),
    # PreResNet and DenseNet of Network Slimming (Liu et al. 2017, arXiv:1708.06519).
    "cifar_resnet_half_gamma": partial(draw_weights, conv_std=he_fan_out, half_gamma=(nn.BatchNorm2d,)),
    # The gammas of 1-D batch norms, in the classifier, stay at 1.
    "cifar_vgg": partial(_draw_as_vgg, half_gamma=(nn.BatchNorm2d,)),
    # VGG in the study of unstructured pruning of Liu et al. 2019.
    "cifar_vgg_fan_in": partial(draw_weights, conv_std=he_fan_in, linear_std=_one_hundredth),
    # VGG-11 for ImageNet of Network Slimming.
    "slimming_vgg": partial(_draw_as_vgg, half_gamma=(nn.BatchNorm1d, nn.BatchNorm2d)),
    # Sparse Structure Selection (Huang and Wang 2018, arXiv:1707.01213).
    "kaiming_fan_in": partial(draw_weights, conv_std=he_fan_in, linear_std=he_fan_in),
    # The constructors of torchvision's networks.
    "torchvision_resnet": partial(draw_weights, conv_std=he_fan_out),
    "torchvision_vgg": _draw_as_vgg,
    # Each module as its own constructor does.
    "reset_parameters": draw_weights,
}


def initialiser(name: str) -> Callable[[nn.Module], object]:
    """Return what draws the weights: an entry of `INITIALISERS`, or a user's own ``path.to.module:function``.

    Raises
    ------
    UserError
        If there is no such initialiser.

    Examples
    --------
    >>> initialiser("torch.nn.init:zeros_").__name__
    'zeros_'
    """
    return find_named(name, INITIALISERS, "model.init", what="initialiser", form="function")


def family_initialiser(model: nn.Module) -> str | None:
    """Return the name of the initialiser of `model`'s family, or None if the family is not known.

    The class of a network names it in its attribute ``initialiser``; the families of torchvision are listed here.

    Examples
    --------
    >>> from rethink_prune.models.resnet import ResNet
    >>> family_initialiser(ResNet(20))
    'cifar_resnet'
    >>> from torchvision.models import squeezenet1_1, vgg11
    >>> family_initialiser(vgg11(num_classes=2))
    'torchvision_vgg'
    >>> family_initialiser(squeezenet1_1(num_classes=2))
    """
    # Only the class itself counts: a class derived from a family may have layers that the family does not.
    named = vars(type(model)).get("initialiser")
    if isinstance(named, str) and named in INITIALISERS:
        return named
    # Importing torchvision takes seconds. Where nobody has imported it, the network is not torchvision's.
    if "torchvision" not in sys.modules:
        return None
    from torchvision.models import VGG, MobileNetV2, MobileNetV3, ResNet

    if type(model) is ResNet:
        return "torchvision_resnet"
    return "torchvision_vgg" if type(model) in (VGG, MobileNetV2, MobileNetV3) else None
