"""VGG for small images (Simonyan and Zisserman 2014, arXiv:1409.1556), with batch normalisation.

The forms that CIFAR pruning papers use: the convolutional part of VGG, global average pooling, and a classifier with
one hidden layer of 512 units or with none. At 32 x 32 the pooling window is 2 x 2, as in Liu et al. (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Output channels of the 3 x 3 convolutions; "M" halves height and width.
LAYERS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3),
    "vgg19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4),
}


class VGG(nn.Module):
    """Convolutions with batch norm and ReLU, global average pooling, a classifier.

    Parameters
    ----------
    layers : sequence of int or "M"
        Output channels per convolution, ``"M"`` for a 2 x 2 max pooling.
    head : {"mlp", "linear"}
        The classifier: Linear-BatchNorm-ReLU-Linear, or one linear layer as in Network Slimming (Liu et al. 2017,
        arXiv:1708.06519).
    conv_bias : bool
        Whether the convolutions have biases, which the batch norms after them make redundant. The unstructured
        networks of Liu et al. (2019) have them.
    num_classes, in_channels, hidden_features : int
        Sizes of the output, the input image's channels, and the hidden layer of the head ``"mlp"``.

    Notes
    -----
    Takes N x `in_channels` x H x W with H, W >= 16, gives N x `num_classes`.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        *,
        head: str = "mlp",
        conv_bias: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
        hidden_features: int = 512,
    ) -> None:
        super().__init__()
        if head not in ("mlp", "linear"):
            raise ValueError(f"head={head}: must be mlp or linear")
        self.features = convolutions(layers, in_channels=in_channels, bias=conv_bias, batch_norm=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        channels = int(layers[-1])
        if head == "linear":
            self.classifier = nn.Sequential(nn.Linear(channels, num_classes))
        else:
            self.classifier = nn.Sequential(
                nn.Linear(channels, hidden_features),
                nn.BatchNorm1d(hidden_features),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_features, num_classes),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def convolutions(layers: Sequence[int | str], *, in_channels: int, bias: bool, batch_norm: bool) -> nn.Sequential:
    """Build the convolutional part of a VGG: for each width a 3 x 3 convolution, batch norm if wanted, and ReLU."""
    modules: list[nn.Module] = []
    for width in layers:
        if isinstance(width, str):
            modules.append(nn.MaxPool2d(2))
            continue
        modules.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=bias))
        if batch_norm:
            modules.append(nn.BatchNorm2d(width))
        modules.append(nn.ReLU(inplace=True))
        in_channels = width
    return nn.Sequential(*modules)
