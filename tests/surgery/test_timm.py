"""Networks of timm, which nobody wrote for the analysis: every pruner cuts what is free and lists what is not."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from harness import mask, randomise
from rethink_prune import count_cost, prune
from rethink_prune.pruning import PRUNERS
from rethink_prune.pruning.weight_pruner import WeightPruner
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply

IMAGE = (3, 64, 64)
# With the share of the parameters that may at most be left when half of the units of scope "all" go.
NETWORKS = {
    "resnet10t": 0.4,
    "densenet121": 0.4,
    "regnetx_002": 0.4,
    "mobilenetv3_small_050": 0.5,
    "convnext_atto": 0.7,
}
NEW_SIZES = {
    "thinet": {"entries_per_image": 16},
    "regression": {"positions_per_image": 16},
    "synflow": {"iterations": 5},
}


def build(name: str) -> nn.Module:
    return randomise(timm.create_model(name, num_classes=5))


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_equals_masked(name: str) -> None:
    model, x = build(name), torch.randn(2, *IMAGE, dtype=torch.float64)
    channels = analyse(model, x)
    drop = {group.name: range(0, group.size, 2) for group in channels.groups("all")}
    pruned, _ = apply(model, channels.plan(drop))
    with torch.no_grad():
        before, masked, after = model(x), mask(model, channels, drop)(x), pruned(x)
    assert (masked - after).abs().max() < 1e-10 * max(1.0, masked.abs().max().item())
    assert (masked - before).abs().max() > 1e-6, "masking changed nothing, so the comparison shows nothing"
    assert count_cost(pruned, IMAGE).params < NETWORKS[name] * count_cost(model, IMAGE).params


@pytest.mark.parametrize("pruner", sorted(set(PRUNERS) - {"sss", "guided"}))
def test_pruners_cut_what_is_free_and_list_what_is_not(pruner: str) -> None:
    model = build("resnet10t").float()
    data = [(torch.randn(16, *IMAGE), torch.zeros(16, dtype=torch.int64)) for _ in range(2)]
    options: dict[str, Any] = NEW_SIZES.get(pruner, {})
    of_weights = issubclass(PRUNERS[pruner], WeightPruner)
    skip = {} if of_weights else {"skip": ["layer[34].*"]}  # wide: they take long, and more samples than there are
    result = prune(model, pruner, example=data[0][0][:1], data=data, ratio=0.3, **skip, **options)
    assert result.model(data[0][0]).shape == (16, 5)
    assert sum(layer.kept for layer in result.report.layers) < sum(layer.full for layer in result.report.layers)
    if not of_weights:
        assert result.report.frozen["fc"] == "network output"
        if pruner != "regression":  # which leaves streams whole that a branch selects from
            assert set(result.report.frozen) == {"fc"}
