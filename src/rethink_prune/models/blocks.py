"""What several families share: blocks by depth, networks that are a chain or three stages, parts of transformers."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

# Builds a block from its input channels, its output channels and its stride.
Block = Callable[[int, int, int], nn.Module]


def count_blocks(depth: int, *, layers_per_block: int, other_layers: int) -> int:
    """Return the blocks of each stage, n in ``depth = layers_per_block * n + other_layers``.

    `layers_per_block` counts the layers of one block in every stage.

    Raises
    ------
    ValueError
        If no number of blocks gives this depth.

    Examples
    --------
    >>> count_blocks(56, layers_per_block=6, other_layers=2)
    9
    """
    blocks, remainder = divmod(depth - other_layers, layers_per_block)
    if remainder or blocks < 1:
        raise ValueError(f"depth={depth}: must be {layers_per_block}n + {other_layers} with n >= 1")
    return blocks


def stack_blocks(block: Block, in_channels: int, out_channels: int, *, blocks: int, stride: int) -> nn.Sequential:
    """Build a stage: the first block changes channels and size, the others keep both."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *[block(out_channels, out_channels, 1) for _ in range(blocks - 1)])


class ChainNetwork(nn.Module):
    """A network that runs its modules one after another, in the order of their definition; the last one classifies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        *layers, classifier = self.children()
        for layer in layers:
            x = layer(x)
        return classifier(x.flatten(1))


class ThreeStageNetwork(ChainNetwork):
    """A 3 x 3 convolution, three stages of blocks, global average pooling and a linear layer.

    Takes N x `in_channels` x H x W of any size, gives N x `num_classes`.

    Parameters
    ----------
    channels : sequence of int
        Output channels of the first convolution and of the three stages. The second and third stage halve the size.
    blocks : int
        Blocks of each stage.
    """

    # Whether blocks begin with batch norm and ReLU. These then stand after the last block, not before the first one.
    preactivated = False

    def __init__(
        self, block: Block, channels: Sequence[int], *, blocks: int, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        # Modules draw their weights when they are made: another order would give other networks for the same seed.
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        if not self.preactivated:
            self.bn1, self.relu = nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True)
        self.layer1 = stack_blocks(block, channels[0], channels[1], blocks=blocks, stride=1)
        self.layer2 = stack_blocks(block, channels[1], channels[2], blocks=blocks, stride=2)
        self.layer3 = stack_blocks(block, channels[2], channels[3], blocks=blocks, stride=2)
        if self.preactivated:
            self.bn, self.relu = nn.BatchNorm2d(channels[3]), nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[3], num_classes)


class Mlp(nn.Module):
    """Two layers with an exact GELU between them, in the names of timm.

    Parameters
    ----------
    fc1, fc2 : nn.Module
        Linear layers or 1 x 1 convolutions. The outputs of the first are the hidden units.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, nn.GELU(), fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the second layer."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, the branch of an image is zero at random.

    What is not dropped is divided by the share that stays. Takes tokens, N x T x C, or images, N x C x H x W.

    Parameters
    ----------
    rate : float
        The probability to drop, in [0, 1).

    Examples
    --------
    >>> torch.unique(DropPath(0.5)(torch.ones(100, 2, 3)).sum((1, 2))).tolist()
    [0.0, 12.0]
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        # A module of torch stays one call in a trace, the same in training and evaluation.
        self.dropout = nn.Dropout3d(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the branches in their shape."""
        # With one more dimension, an image is what Dropout3d draws for: of N x 1 x C x H x W, each of the N x 1
        # channels; and 1 x T x C, without a batch dimension, is one of N channels.
        return self.dropout(x.unsqueeze(1)).squeeze(1)


def drop_paths(rate: float, blocks: int) -> list[nn.Module]:
    """Return what follows the branch of each block: rates rise linearly, from zero to `rate` in the last block.

    Raises
    ------
    ValueError
        If the rate is not in [0, 1).

    Examples
    --------
    >>> [drop.dropout.p for drop in drop_paths(0.2, 3)[1:]], drop_paths(0.2, 3)[0]
    ([0.1, 0.2], Identity())
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path={rate}: must be in [0, 1)")
    rates = [rate * block / max(1, blocks - 1) for block in range(blocks)]
    return [DropPath(rate) if rate else nn.Identity() for rate in rates]
