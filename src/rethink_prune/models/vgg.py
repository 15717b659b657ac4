"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556): for small images, and what torchvision lacks for ImageNet.

The forms for small images are those that CIFAR pruning papers use: the convolutional part of VGG with batch norm,
global average pooling, and a classifier with one hidden layer of 512 units or with none. At 32 x 32 the pooling window
is 2 x 2, as in Liu et al. (2019).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from rethink_prune.models.blocks import ChainNetwork

# Output channels of each 3 x 3 convolution; "M" is a 2 x 2 max pooling.
Layers = Sequence[int | str]

LAYERS: dict[str, Layers] = {
    "vgg5": (12, "M", 24, "M", 48, 48, 48),  # no published one: narrow, for a second on a CPU
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3),
    "vgg19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4),
}


class PlainNetwork(ChainNetwork):
    """Convolutions with ReLU, average pooling, linear layers.

    Parameters
    ----------
    layers : sequence of int or "M"
        Output channels of each 3 x 3 convolution, ``"M"`` for a 2 x 2 max pooling.
    features : sequence of int
        Inputs of the first linear layer, then outputs of each. Batch norm and ReLU follow all but the last.
    conv_bias, batch_norm : bool
        Whether convolutions have biases, whether a batch norm follows each.
    """

    def __init__(
        self, layers: Layers, features: Sequence[int], *, in_channels: int, conv_bias: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for width in layers:
            if isinstance(width, str):
                modules.append(nn.MaxPool2d(2))
            else:
                norm = [nn.BatchNorm2d(width)] if batch_norm else []
                modules += [nn.Conv2d(in_channels, width, 3, padding=1, bias=conv_bias), *norm, nn.ReLU(inplace=True)]
                in_channels = width
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        hidden: list[nn.Module] = []
        for inputs, outputs in pairwise(features[:-1]):
            hidden += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(features[-2], features[-1]))


class VGG(PlainNetwork):
    """VGG for small images, with batch norm.

    Takes N x `in_channels` x H x W with H, W >= 16, gives N x `num_classes`.

    Parameters
    ----------
    layers : sequence of int or "M"
        See :class:`PlainNetwork`.
    head : {"mlp", "linear"}
        The classifier: Linear-BatchNorm-ReLU-Linear, or one linear layer as in Network Slimming (Liu et al. 2017,
        arXiv:1708.06519).
    conv_bias : bool
        Whether the convolutions have biases, which the batch norms after them make redundant. The unstructured
        networks of Liu et al. (2019) have them.
    hidden_features : int
        Outputs of the hidden layer of the head ``"mlp"``.

    Examples
    --------
    >>> import torch
    >>> VGG((8, "M", 16), num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    initialiser = "cifar_vgg"

    def __init__(
        self,
        layers: Layers,
        *,
        head: str = "mlp",
        conv_bias: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
        hidden_features: int = 512,
    ) -> None:
        if head not in ("mlp", "linear"):
            raise ValueError(f"head={head}: must be mlp or linear")
        hidden = [hidden_features] if head == "mlp" else []
        features = (int(layers[-1]), *hidden, num_classes)
        super().__init__(layers, features, in_channels=in_channels, conv_bias=conv_bias, batch_norm=True)


class VGG16GAP(PlainNetwork):
    """VGG-16 for ImageNet without batch norm and last pooling: global average pooling and one linear layer instead.

    The base of VGG-GAP and VGG-Tiny in ThiNet (Luo et al. 2017, arXiv:1707.06342), as Liu et al. (2019) build it.
    Takes N x `in_channels` x H x W with H, W >= 16, gives N x `num_classes`.

    Examples
    --------
    >>> import torch
    >>> with torch.device("meta"):
    ...     VGG16GAP()(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    """

    # Halves the gammas of batch norms, of which there are none here.
    initialiser = "slimming_vgg"

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3) -> None:
        features = (512, num_classes)
        super().__init__(LAYERS["vgg16"], features, in_channels=in_channels, conv_bias=True, batch_norm=False)


class VGG11BatchNorm1d(PlainNetwork):
    """VGG-11 for ImageNet with batch norm after the convolutions and the hidden linear layers, without dropout.

    The base of Network Slimming on ImageNet (Liu et al. 2017, arXiv:1708.06519), where the gammas of the linear
    layers' batch norms say which of their neurons go. Takes N x `in_channels` x H x W with H, W >= 32, gives
    N x `num_classes`.

    Examples
    --------
    >>> import torch
    >>> with torch.device("meta"):
    ...     VGG11BatchNorm1d()(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    """

    initialiser = "slimming_vgg"

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3) -> None:
        layers, features = (*LAYERS["vgg11"], "M"), (512 * 7 * 7, 4096, 4096, num_classes)
        super().__init__(layers, features, in_channels=in_channels, conv_bias=True, batch_norm=True)
        # For images of another size: at 224 x 224 its input is 7 x 7 already.
        self.pool = nn.AdaptiveAvgPool2d(7)


NETWORKS = {
    **{name: partial(VGG, layers) for name, layers in LAYERS.items()},
    "vgg5": partial(VGG, LAYERS["vgg5"], head="linear"),
    "vgg16_gap": VGG16GAP,
    "vgg11_bn1d": VGG11BatchNorm1d,
}
