"""Pre-activation ResNet-50 for ImageNet (He et al. 2016, arXiv:1603.05027).

The base network of Sparse Structure Selection (Huang and Wang 2018, arXiv:1707.01213): the stride is in the 3 x 3
convolution, projections read the pre-activated input, and the data pass no batch norm before the first convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rethink_prune.models.preresnet import PreActBottleneck


class PreActResNet(nn.Module):
    """Four stages of pre-activation bottlenecks with 256, 512, 1024 and 2048 output channels.

    Parameters
    ----------
    blocks : sequence of int
        Blocks of each of the four stages; ``(3, 4, 6, 3)`` is ResNet-50.
    num_classes, in_channels : int
        Sizes of the output and of the input image's channels.

    Notes
    -----
    Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.
    """

    def __init__(self, blocks: Sequence[int], *, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()

        def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
            first = PreActBottleneck(in_channels, channels, stride, project_preactivated=True)
            rest = [PreActBottleneck(4 * channels, channels, 1, project_preactivated=True) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(64, 64, blocks[0], 1)
        self.layer2 = stage(256, 128, blocks[1], 2)
        self.layer3 = stage(512, 256, blocks[2], 2)
        self.layer4 = stage(1024, 512, blocks[3], 2)
        self.bn2 = nn.BatchNorm2d(2048)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(self.relu(self.bn2(x))).flatten(1))
