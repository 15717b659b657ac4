"""ResNeXt for small images (Xie et al. 2017, arXiv:1611.05431): bottlenecks around a grouped convolution."""

from functools import partial

import torch
from torch import nn

from rethink_prune.models.blocks import ThreeStageNetwork, count_blocks


class ResNeXtBlock(nn.Module):
    """Convolutions of 1 x 1, grouped 3 x 3 and 1 x 1; a 1 x 1 convolution in the shortcut where the shape changes.

    Parameters
    ----------
    width : int
        Output channels of the first two convolutions.
    groups, stride : int
        Of the 3 x 3 convolution; the shortcut has the same stride.
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


class ResNeXt(ThreeStageNetwork):
    """Three stages of ResNeXt blocks with 256, 512 and 1024 output channels.

    Parameters
    ----------
    depth : int
        ``9n + 2`` for ``n`` blocks per stage: 29, ...
    cardinality : int
        Groups of the 3 x 3 convolutions.
    base_width : int
        Channels of each group in the first stage. They double from stage to stage.

    Examples
    --------
    >>> with torch.device("meta"):
    ...     ResNeXt(29).layer1[0].conv2
    Conv2d(512, 512, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=8, bias=False)
    """

    initialiser = "cifar_resnet"

    def __init__(
        self, depth: int, *, cardinality: int = 8, base_width: int = 64, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        blocks = count_blocks(depth, layers_per_block=9, other_layers=2)
        for option, value in (("cardinality", cardinality), ("base_width", base_width)):
            if value < 1:
                raise ValueError(f"{option}={value}: must be at least 1")

        def block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
            # By convention, `base_width` is meant for the stage with 256 output channels.
            width = cardinality * base_width * out_channels // 256
            return ResNeXtBlock(in_channels, width, out_channels, groups=cardinality, stride=stride)

        super().__init__(block, (64, 256, 512, 1024), blocks=blocks, num_classes=num_classes, in_channels=in_channels)


NETWORKS = {"resnext29": partial(ResNeXt, 29)}
