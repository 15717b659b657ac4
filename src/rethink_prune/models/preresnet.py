"""Pre-activation ResNet for small images (He et al. 2016, arXiv:1603.05027): bottleneck blocks in three stages.

The form of Network Slimming (Liu et al. 2017, arXiv:1708.06519) and of Liu et al. (2019).
"""

from __future__ import annotations

import torch
from torch import nn


class PreActBottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, batch norm and ReLU before each; nothing after the addition.

    Parameters
    ----------
    in_channels, channels : int
        Channels of the input and of the 3 x 3 convolution; the output has ``4 * channels``.
    stride : int
        Stride of the 3 x 3 convolution, and of the projection.
    project_preactivated : bool
        Where the shape changes, a 1 x 1 convolution makes the shortcut: from the input after its batch norm and ReLU
        as He et al. do, or from the input itself as the CIFAR networks of pruning papers do.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, *, project_preactivated: bool) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        self.project_preactivated = project_preactivated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, N x ``4 * channels`` x H / stride x W / stride."""
        activated = self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        if self.projection is None:
            return out + x
        return out + self.projection(activated if self.project_preactivated else x)


class PreResNet(nn.Module):
    """Three stages of pre-activation bottlenecks with 64, 128 and 256 output channels.

    Parameters
    ----------
    depth : int
        ``9n + 2`` for ``n`` blocks per stage: 20, 29, ..., 110, 164.
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.

    Notes
    -----
    Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 9)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: must be 9n + 2 with n >= 1")

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = PreActBottleneck(in_channels, channels, stride, project_preactivated=False)
            rest = [PreActBottleneck(4 * channels, channels, 1, project_preactivated=False) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(64, 32, 2)
        self.layer3 = stage(128, 64, 2)
        self.bn = nn.BatchNorm2d(256)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))
