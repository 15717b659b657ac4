"""How each family of networks draws its weights.

An initialiser draws *every* parameter of a network anew, whatever its widths, and resets every running statistic. It
uses torch's global generator, module by module in the order of ``model.modules()``. Scratch arms call it after surgery:
the standard deviation depends on the width, so a slice of a wide layer's weights is not the initialisation of a narrow
layer.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from rethink_prune.imports import find_named

Layer = nn.Conv2d | nn.Linear
Std = Callable[[Layer], float]
Draw = Callable[[Tensor], object]


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


def lecun_fan_in(layer: Layer) -> float:
    """Return ``sqrt(1 / fan-in)``.

    Examples
    --------
    >>> lecun_fan_in(nn.Linear(16, 5))
    0.25
    """
    return math.sqrt(1.0 / layer.weight[0].numel())


def _one_hundredth(layer: Layer) -> float:
    return 0.01


def _two_hundredths(layer: Layer) -> float:
    return 0.02


def draw_weights(
    model: nn.Module,
    *,
    conv_std: Std | None = None,
    linear_std: Std | None = None,
    half_gamma: tuple[type[nn.Module], ...] = (),
    others: Mapping[str, Draw] = MappingProxyType({}),
) -> None:
    """Draw normal weights and zero biases; let every other module reset itself, as its constructor does.

    Parameters
    ----------
    conv_std, linear_std : callable, optional
        Give the standard deviation of a 2-D convolution, of a linear layer; without it they reset themselves too.
    half_gamma : tuple of types
        Kinds of batch norm whose gamma starts at 0.5. All others start at 1.
    others : mapping of str to callable
        Draws parameters that modules hold themselves, such as a class token, in place, by their names there. It is for
        modules without ``reset_parameters``.

    Raises
    ------
    ValueError
        If a module holds other parameters of its own and has no ``reset_parameters``.

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
        elif not isinstance(module, nn.MultiheadAttention):
            # Only the module's own parameters: those of its children are drawn when their turn comes.
            for key, parameter in module.named_parameters(recurse=False):
                if key not in others:
                    raise ValueError(f"{name or 'the network'} ({type(module).__name__}) has no reset_parameters()")
                others[key](parameter)
        if isinstance(module, half_gamma):
            nn.init.constant_(module.get_parameter("weight"), 0.5)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()  # torch's own: after its output layer, whose bias it sets to zero


_tiny = partial(nn.init.normal_, std=1e-6)
# These networks truncate at 2, which is a hundred standard deviations here: no draw is that large.
_small = partial(nn.init.normal_, std=0.02)
_first_scale = partial(nn.init.constant_, val=1e-6)


def _draw_as_torchvision_vit(model: nn.Module) -> None:
    draw_weights(model, conv_std=lecun_fan_in, others={"class_token": nn.init.zeros_, "pos_embedding": _small})
    for name, layer in model.named_modules():
        # The output layers of attention are of a class derived from it, and are drawn already.
        if type(layer) is nn.Linear:
            if name.startswith("heads."):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            else:
                nn.init.xavier_uniform_(layer.weight)
                _tiny(layer.bias)


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
    "torchvision_vit": _draw_as_torchvision_vit,
    "torchvision_swin": partial(
        draw_weights,
        linear_std=_two_hundredths,
        # The second is of Swin v2.
        others={"relative_position_bias_table": _small, "logit_scale": partial(nn.init.constant_, val=math.log(10))},
    ),
    "torchvision_convnext": partial(
        draw_weights, conv_std=_two_hundredths, linear_std=_two_hundredths, others={"layer_scale": _first_scale}
    ),
    # The constructors of timm's networks.
    "timm_vit": partial(
        draw_weights, linear_std=_two_hundredths, others={"cls_token": _tiny, "reg_token": _tiny, "pos_embed": _small}
    ),
    "timm_convnext": partial(
        draw_weights, conv_std=_two_hundredths, linear_std=_two_hundredths, others={"gamma": _first_scale}
    ),
    # Each module as its own constructor does.
    "reset_parameters": draw_weights,
}

# By class, so that nothing has to be imported, which takes seconds.
_FOREIGN_FAMILIES = {
    "torchvision.models.resnet.ResNet": "torchvision_resnet",
    "torchvision.models.vgg.VGG": "torchvision_vgg",
    "torchvision.models.mobilenetv2.MobileNetV2": "torchvision_vgg",
    "torchvision.models.mobilenetv3.MobileNetV3": "torchvision_vgg",
    "torchvision.models.vision_transformer.VisionTransformer": "torchvision_vit",
    "torchvision.models.swin_transformer.SwinTransformer": "torchvision_swin",
    "torchvision.models.convnext.ConvNeXt": "torchvision_convnext",
    "timm.models.vision_transformer.VisionTransformer": "timm_vit",
    "timm.models.convnext.ConvNeXt": "timm_convnext",
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

    The class of a network names it in its attribute ``initialiser``; torchvision's and timm's are listed here.

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
    return _FOREIGN_FAMILIES.get(f"{type(model).__module__}.{type(model).__qualname__}")
