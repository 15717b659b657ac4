"""ResNeXt for small images (Xie et al. 2017, arXiv:1611.05431): bottlenecks around a grouped convolution."""

from __future__ import annotations

import torch
from torch import nn


class ResNeXtBlock(nn.Module):
    """Convolutions of 1 x 1, grouped 3 x 3 and 1 x 1; a 1 x 1 convolution in the shortcut where the shape changes.

    Parameters
    ----------
    in_channels, width, out_channels : int
        Channels of the input, of the grouped convolution and of the output.
    groups : int
        Groups of the 3 x 3 convolution.
    stride : int
        Stride of the 3 x 3 convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, *, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, N x `out_channels` x H / stride x W / stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.shortcut(x))


class ResNeXt(nn.Module):
    """Three stages of ResNeXt blocks with 256, 512 and 1024 output channels.

    Parameters
    ----------
    depth : int
        ``9n + 2`` for ``n`` blocks per stage: 29, ...
    cardinality, base_width : int
        Groups of the 3 x 3 convolutions, and channels per group in the first stage; they double from stage to stage.
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.

    Notes
    -----
    Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.
    """

    def __init__(
        self,
        depth: int,
        *,
        cardinality: int = 8,
        base_width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 9)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: must be 9n + 2 with n >= 1")
        if cardinality < 1:
            raise ValueError(f"cardinality={cardinality}: must be at least 1")
        if base_width < 1:
            raise ValueError(f"base_width={base_width}: must be at least 1")

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            width = cardinality * base_width * out_channels // 256
            first = ResNeXtBlock(in_channels, width, out_channels, groups=cardinality, stride=stride)
            rest = [
                ResNeXtBlock(out_channels, width, out_channels, groups=cardinality, stride=1) for _ in range(blocks - 1)
            ]
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(64, 256, 1)
        self.layer2 = stage(256, 512, 2)
        self.layer3 = stage(512, 1024, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))
