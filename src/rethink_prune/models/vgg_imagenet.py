"""The VGGs for ImageNet that torchvision does not have, as Liu et al. (2019) build them."""

from __future__ import annotations

import torch
from torch import nn

from rethink_prune.models.vgg import LAYERS, convolutions


class VGG16GAP(nn.Module):
    """VGG-16 without batch norm and last pooling: global average pooling and one linear layer instead.

    The base of VGG-GAP and VGG-Tiny in ThiNet (Luo et al. 2017, arXiv:1707.06342).

    Parameters
    ----------
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.

    Notes
    -----
    Takes N x `in_channels` x H x W with H, W >= 16, gives N x `num_classes`.
    """

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.features = convolutions(LAYERS["vgg16"], in_channels=in_channels, bias=True, batch_norm=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(512, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


class VGG11BatchNorm1d(nn.Module):
    """VGG-11 with batch norm after every convolution and after the hidden linear layers, without dropout.

    The base of Network Slimming on ImageNet (Liu et al. 2017, arXiv:1708.06519), where the gammas of the linear
    layers' batch norms say which of their neurons go.

    Parameters
    ----------
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.

    Notes
    -----
    Takes N x `in_channels` x H x W with H, W >= 32, gives N x `num_classes`.
    """

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        layers = (*LAYERS["vgg11"], "M")
        self.features = convolutions(layers, in_channels=in_channels, bias=True, batch_norm=True)
        self.pool = nn.AdaptiveAvgPool2d(7)  # changes nothing at 224 x 224
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.BatchNorm1d(4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.BatchNorm1d(4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))
