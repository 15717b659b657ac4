"""Pre-activation ResNets (He et al. 2016, arXiv:1603.05027) with bottleneck blocks: for small images, for ImageNet."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from rethink_prune.models.blocks import ThreeStageNetwork, count_blocks, stack_blocks


class PreActBottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, batch norm and ReLU before each; nothing after the addition.

    Parameters
    ----------
    out_channels : int
        Output channels; the first two convolutions have a quarter of them.
    stride : int
        Stride of the 3 x 3 convolution, and of the projection.
    project_preactivated : bool
        Where the shape changes, a 1 x 1 convolution makes the shortcut: from the input after its batch norm and ReLU
        as He et al. do, or from the input itself as the CIFAR networks of pruning papers do.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, project_preactivated: bool) -> None:
        super().__init__()
        channels = out_channels // 4
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
        """Return the block's output, N x `out_channels` x H / stride x W / stride."""
        # ReLU works in place. It changes what batch norm has just returned, so that `x` stays whole for the addition.
        activated = self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        if self.projection is None:
            return out + x
        return out + self.projection(activated if self.project_preactivated else x)


class PreResNet(ThreeStageNetwork):
    """For small images: three stages of pre-activation bottlenecks with 64, 128 and 256 output channels.

    The form of Network Slimming (Liu et al. 2017, arXiv:1708.06519) and of Liu et al. (2019). Takes
    N x `in_channels` x H x W of any size, gives N x `num_classes`.

    Parameters
    ----------
    depth : int
        ``9n + 2`` for ``n`` blocks per stage: 20, 29, ..., 110, 164.

    Examples
    --------
    >>> PreResNet(20, num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    initialiser = "cifar_resnet"
    preactivated = True

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        blocks = count_blocks(depth, layers_per_block=9, other_layers=2)
        block = partial(PreActBottleneck, project_preactivated=False)
        super().__init__(block, (16, 64, 128, 256), blocks=blocks, num_classes=num_classes, in_channels=in_channels)


class PreActResNet(nn.Module):
    """For ImageNet: four stages of pre-activation bottlenecks with 256, 512, 1024 and 2048 output channels.

    The base network of Sparse Structure Selection (Huang and Wang 2018, arXiv:1707.01213): the stride is in the 3 x 3
    convolution, projections read the pre-activated input, and the images pass no batch norm before the first
    convolution. Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.

    Parameters
    ----------
    blocks : sequence of int
        Blocks of each of the four stages; ``(3, 4, 6, 3)`` is ResNet-50.

    Examples
    --------
    >>> PreActResNet((1, 1, 1, 1), num_classes=5)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 5])
    """

    initialiser = "kaiming_fan_in"

    def __init__(self, blocks: Sequence[int], *, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        block = partial(PreActBottleneck, project_preactivated=True)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stack_blocks(block, 64, 256, blocks=blocks[0], stride=1)
        self.layer2 = stack_blocks(block, 256, 512, blocks=blocks[1], stride=2)
        self.layer3 = stack_blocks(block, 512, 1024, blocks=blocks[2], stride=2)
        self.layer4 = stack_blocks(block, 1024, 2048, blocks=blocks[3], stride=2)
        self.bn2 = nn.BatchNorm2d(2048)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(self.relu(self.bn2(x))).flatten(1))


NETWORKS = {
    **{f"preresnet{depth}": partial(PreResNet, depth) for depth in (*range(20, 111, 9), 164)},
    "preact_resnet50": partial(PreActResNet, (3, 4, 6, 3)),
}
