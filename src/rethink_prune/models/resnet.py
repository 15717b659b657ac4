"""ResNet for small images (He et al. 2016, arXiv:1512.03385, section 4.2): basic blocks and option-A shortcuts."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.models.blocks import ThreeStageNetwork, count_blocks


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    Where the shape changes, the shortcut averages 2 x 2 windows and appends zero channels (option A, in the form of
    Liu et al. 2019).

    Parameters
    ----------
    channels : int
        Output channels of both convolutions.
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
            # The first convolution rounds odd sizes up, so the shortcut has to.
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        # Pairs of (before, after), from the last dimension to the first: width, height, channels.
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, N x `channels` x H / stride x W / stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(ThreeStageNetwork):
    """Three stages of basic blocks with 16, 32 and 64 channels.

    Parameters
    ----------
    depth : int
        ``6n + 2`` for ``n`` blocks per stage: 20, 32, 44, 56, 110, ...
    detach_shortcut : bool
        See :class:`BasicBlock`.

    Examples
    --------
    >>> ResNet(20, num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    initialiser = "cifar_resnet"

    def __init__(
        self, depth: int, *, num_classes: int = 10, in_channels: int = 3, detach_shortcut: bool = False
    ) -> None:
        blocks = count_blocks(depth, layers_per_block=6, other_layers=2)
        block = partial(BasicBlock, detach_shortcut=detach_shortcut)
        super().__init__(block, (16, 16, 32, 64), blocks=blocks, num_classes=num_classes, in_channels=in_channels)


NETWORKS = {f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)}
