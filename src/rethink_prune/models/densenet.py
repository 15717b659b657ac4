"""DenseNet for small images (Huang et al. 2017, arXiv:1608.06993): each layer adds its channels to all before it."""

from functools import partial

import torch
from torch import nn

from rethink_prune.models.blocks import ChainNetwork, count_blocks


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3 x 3 convolution, whose output joins the input.

    Parameters
    ----------
    growth_rate : int
        Channels that the layer adds.
    bottleneck : bool
        Let a 1 x 1 convolution bring the input to ``4 * growth_rate`` channels first.
    """

    def __init__(self, in_channels: int, growth_rate: int, *, bottleneck: bool) -> None:
        super().__init__()
        inner = 4 * growth_rate if bottleneck else in_channels
        first = _norm_relu_conv(in_channels, inner, kernel_size=1) if bottleneck else []
        self.branch = nn.Sequential(*first, *_norm_relu_conv(inner, growth_rate, kernel_size=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input and the new channels, N x (`in_channels` + `growth_rate`) x H x W."""
        return torch.cat([x, self.branch(x)], 1)


class DenseNet(ChainNetwork):
    """Three stages of densely connected layers, with a 1 x 1 convolution and 2 x 2 average pooling between them.

    Parameters
    ----------
    depth : int
        ``3n + 4`` for ``n`` layers per stage, with `bottleneck` ``6n + 4``.
    growth_rate : int
        Channels that a layer adds.
    bottleneck : bool
        See :class:`DenseLayer`.
    compression : float
        Share of the channels that the convolution between two stages keeps, in (0, 1].

    Notes
    -----
    Takes N x `in_channels` x H x W with H, W >= 4, gives N x `num_classes`. The first convolution has twice
    `growth_rate` channels, also without bottleneck and compression, as in Network Slimming (Liu et al. 2017,
    arXiv:1708.06519). What Liu et al. (2019) call DenseNet-BC-100 is, in their code, the form without bottleneck.

    Examples
    --------
    >>> DenseNet(10, num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    initialiser = "cifar_resnet"

    def __init__(
        self,
        depth: int,
        *,
        growth_rate: int = 12,
        bottleneck: bool = False,
        compression: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers = count_blocks(depth, layers_per_block=6 if bottleneck else 3, other_layers=4)
        if growth_rate < 1:
            raise ValueError(f"growth_rate={growth_rate}: must be at least 1")
        if not 0 < compression <= 1:
            raise ValueError(f"compression={compression}: must be in (0, 1]")

        def stage(in_channels: int) -> nn.Sequential:
            starts = [in_channels + i * growth_rate for i in range(layers)]
            return nn.Sequential(*[DenseLayer(start, growth_rate, bottleneck=bottleneck) for start in starts])

        def transition(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(*_norm_relu_conv(in_channels, out_channels, kernel_size=1), nn.AvgPool2d(2))

        first, added = 2 * growth_rate, layers * growth_rate
        # The sizes round down, and at least one channel is left, however strong the compression.
        second = max(1, int((first + added) * compression))
        third = max(1, int((second + added) * compression))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.dense1 = stage(first)
        self.transition1 = transition(first + added, second)
        self.dense2 = stage(second)
        self.transition2 = transition(second + added, third)
        self.dense3 = stage(third)
        self.bn = nn.BatchNorm2d(third + added)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third + added, num_classes)


def _norm_relu_conv(in_channels: int, out_channels: int, *, kernel_size: int) -> list[nn.Module]:
    # The convolution needs no bias: a batch norm comes after it, before the next convolution or the classifier.
    return [
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
    ]


NETWORKS = {
    "densenet40": partial(DenseNet, 40),
    "densenet_bc100": partial(DenseNet, 100, bottleneck=True, compression=0.5),
}
