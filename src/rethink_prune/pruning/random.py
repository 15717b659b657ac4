"""Random pruning: the baseline. What a criterion is worth is what it gains over this at the same widths.

Every unit gets a uniformly drawn score; the lowest go, layer by layer, so the widths are those of any other pruner with
the same ratio. The draw follows the study's seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rethink_prune.pruning.pruner import Batches, Pruner
from rethink_prune.surgery.channels import ChannelGroup


class Random(Pruner):
    """Scores at random."""

    def scores(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        data: Batches | None,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Return uniform draws from [0, 1), one per unit, in float64."""
        return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}
