"""The reference that surgery is compared with: the same network, with the channels masked to zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from harness import mask, randomise
from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply

Drop = Mapping[str, Sequence[int]]
Compare = Callable[..., tuple[Channels, nn.Module]]


def random_drop(channels: Channels, scope: str, share: float, seed: int = 0) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: int(group.size * share)].tolist()
        for group in channels.groups(scope)
    }


@pytest.fixture
def pruned_equals_masked() -> Compare:
    """Prune at random, or as told, and compare with the masked network; give the analysis and the result."""

    def compare(
        model: nn.Module,
        shape: tuple[int, ...],
        *,
        scope: str = "all",
        share: float = 0.5,
        drop: Drop | None = None,
        selecting: Literal["norm", "conv"] | None = None,
        attention: Literal["heads", "widths"] = "heads",
    ) -> tuple[Channels, nn.Module]:
        randomise(model)
        example = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        channels = analyse(model, example, selecting=selecting, attention=attention)
        chosen = random_drop(channels, scope, share) if drop is None else drop
        with torch.no_grad():
            before = model(example)
            masked = mask(model, channels, chosen)(example)
            pruned, _ = apply(model, channels.plan(chosen))
            after = pruned(example)
            assert torch.equal(model(example), before), "the network itself was changed"
        assert after.shape == before.shape
        assert (after - masked).abs().max() < 1e-10
        if any(chosen.values()):
            assert (before - masked).abs().max() > 1e-6, "masking changed nothing, so the comparison shows nothing"
        return channels, pruned

    return compare
