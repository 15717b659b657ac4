"""VGG for small images (Simonyan and Zisserman 2014, arXiv:1409.1556), with batch normalisation.

The form that CIFAR pruning papers use: the convolutional part of VGG, global average pooling, and a classifier with
one hidden layer of 512 units. At 32 x 32 the pooling window is 2 x 2, as in Liu et al. (2019).
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
    """Convolutions with batch norm and ReLU, global average pooling, Linear-BatchNorm-ReLU-Linear.

    Parameters
    ----------
    layers : sequence of int or "M"
        Output channels per convolution, ``"M"`` for a 2 x 2 max pooling.
    num_classes, in_channels, hidden_features : int
        Sizes of the output, the input image's channels, and the classifier's hidden layer.

    Notes
    -----
    Takes N x `in_channels` x H x W with H, W >= 16, gives N x `num_classes`.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        hidden_features: int = 512,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for width in layers:
            if isinstance(width, str):
                features.append(nn.MaxPool2d(2))
                continue
            features += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden_features),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))
