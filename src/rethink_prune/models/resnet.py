"""ResNet for small images (He et al. 2016, arXiv:1512.03385, section 4.2): basic blocks and option-A shortcuts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    Where the shape changes, the shortcut averages 2 x 2 windows and appends zero channels (option A, in the form of
    Liu et al. 2019).

    Parameters
    ----------
    in_channels, channels : int
        Channels of the input and of everything after it.
    stride : {1, 2}
        Stride of the first convolution.
    detach_shortcut : bool
        Stop the gradient in the shape-changing shortcuts, as the reference code of Liu et al. (2019) does.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, detach_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.extra_channels = channels - in_channels
        self.detach_shortcut = detach_shortcut

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the block's input to the shape of its output."""
        if self.stride == 1 and self.extra_channels == 0:
            return x
        if self.detach_shortcut:
            x = x.detach()
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, N x `channels` x H / stride x W / stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels.

    Parameters
    ----------
    depth : int
        ``6n + 2`` for ``n`` blocks per stage: 20, 32, 44, 56, 110, ...
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.
    detach_shortcut : bool
        See :class:`BasicBlock`.

    Notes
    -----
    Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.
    """

    def __init__(
        self, depth: int, *, num_classes: int = 10, in_channels: int = 3, detach_shortcut: bool = False
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: must be 6n + 2 with n >= 1")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = BasicBlock(in_channels, channels, stride, detach_shortcut=detach_shortcut)
            rest = [BasicBlock(channels, channels, 1, detach_shortcut=detach_shortcut) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))
