"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) for small images, in the names and form of timm.

The size is that of timm's ``convnext_atto``: 2, 2, 6 and 2 blocks with 40, 80, 160 and 320 channels. With
``patch_size=4`` it is that network, and the two have the same state dict.
"""

import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.models.blocks import Mlp, drop_paths

_NORM_EPS = 1e-6
_BLOCKS = (2, 2, 6, 2)  # of each stage
_FIRST_SCALE = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of images, N x C x H x W, at each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised images."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 x 7 convolution, a layer norm and an MLP of 1 x 1 convolutions, scaled, beside a shortcut.

    Parameters
    ----------
    channels : int
        Of input and output; the MLP has four times as many.
    drop_path : nn.Module
        Follows the branch; see `drop_paths`.
    """

    def __init__(self, channels: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.mlp = Mlp(nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1))
        self.drop_path = drop_path
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the branch start near zero."""
        nn.init.constant_(self.gamma, _FIRST_SCALE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, N x `channels` x H x W."""
        branch = self.mlp(self.norm(self.conv_dw(x))) * self.gamma.reshape(1, -1, 1, 1)
        return x + self.drop_path(branch)


class ConvNeXtStage(nn.Module):
    """Blocks at one size, which a 2 x 2 convolution with stride 2 halves first in all stages but the first."""

    def __init__(self, in_channels: int, channels: int, drops: list[nn.Module]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if in_channels != channels:
            self.downsample = nn.Sequential(ChannelNorm(in_channels), nn.Conv2d(in_channels, channels, 2, stride=2))
        self.blocks = nn.Sequential(*[ConvNeXtBlock(channels, drop) for drop in drops])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stage's output, N x `channels` x H x W."""
        return self.blocks(self.downsample(x))


class PooledClassifier(nn.Module):
    """Global average pooling, a layer norm and a linear layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = ChannelNorm(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.fc(self.norm(self.pool(x)).flatten(1))


class ConvNeXt(nn.Module):
    """Patches through stages of ConvNeXt blocks; each stage has twice the channels of the one before.

    Takes N x `in_channels` x H x W with H, W of at least ``patch_size * 2 ** (stages - 1)``, gives N x `num_classes`.

    Parameters
    ----------
    patch_size : int
        Kernel size and stride of the first convolution: 4 in the published networks. Where it is 2, timm's networks
        halve the size once more in the first stage; this one does not.
    width : int
        Channels of the first stage.
    stages : int
        How many stages, at most 4. Each but the first halves the size.
    drop_path : float
        Stochastic depth in the last block; see `drop_paths`.

    Examples
    --------
    >>> ConvNeXt(width=4, stages=2, num_classes=5)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 5])
    """

    initialiser = "timm_convnext"

    def __init__(
        self,
        *,
        patch_size: int = 2,
        width: int = 40,
        stages: int = 4,
        drop_path: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        for option, value in (("patch_size", patch_size), ("width", width)):
            if value < 1:
                raise ValueError(f"{option}={value}: must be at least 1")
        if not 1 <= stages <= len(_BLOCKS):
            raise ValueError(f"stages={stages}: must be from 1 to {len(_BLOCKS)}")
        blocks = _BLOCKS[:stages]
        drops = iter(drop_paths(drop_path, sum(blocks)))
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, patch_size, stride=patch_size), ChannelNorm(width))
        self.stages = nn.Sequential()
        before = width
        for number, count in enumerate(blocks):
            channels = width * 2**number
            self.stages.append(ConvNeXtStage(before, channels, [next(drops) for _ in range(count)]))
            before = channels
        self.head = PooledClassifier(before, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        return self.head(self.stages(self.stem(x)))


NETWORKS = {"convnext_atto": ConvNeXt}
