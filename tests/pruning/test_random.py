"""Random pruning: the widths of any other pruner, and a seeded, even draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rethink_prune import build_model, prune
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.channel_pruner import ChannelTarget

EXAMPLE = torch.zeros(1, 3, 16, 16)


def kept_filters(model: nn.Module, seed: int, ratio: float = 0.5) -> list[int]:
    """Return which filters of the first convolution remain; they are told by their values."""
    pruned = prune(model, "random", example=EXAMPLE, seed=seed, ratio=ratio).model.get_parameter("features.0.weight")
    full = model.get_parameter("features.0.weight")
    return [i for i in range(len(full)) if (full[i] == pruned).flatten(1).all(1).any()]


def small_vgg() -> nn.Module:
    torch.manual_seed(0)
    return VGG([12, "M", 8], head="linear")


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.35},
        {"ratio": 0.35, "scope": "all"},
        {"ratio": {"layer2.*": 0.6}, "min_channels": 9},
        {"target_macs": 0.6, "round_to": 2},
    ],
)
def test_widths_are_those_of_l1_with_the_same_options(options: dict[str, Any]) -> None:
    model = build_model("resnet20")
    by_norm, by_chance = (prune(model, name, example=EXAMPLE, **options) for name in ("l1", "random"))
    assert by_chance.report.layers == by_norm.report.layers
    assert by_chance.architecture.modules == by_norm.architecture.modules


def test_the_seed_decides() -> None:
    model = small_vgg()
    torch.manual_seed(1)
    first = kept_filters(model, seed=3)
    torch.manual_seed(2)
    assert kept_filters(model, seed=3) == first, "the global generator takes no part"
    assert len({tuple(kept_filters(model, seed)) for seed in range(8)}) > 6


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = small_vgg()  # seeds it, too
    torch.manual_seed(1)
    kept_filters(model, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_the_weights_take_no_part() -> None:
    model = small_vgg()
    before = kept_filters(model, seed=5)
    with torch.no_grad():
        model.get_parameter("features.0.weight").mul_(torch.linspace(0.001, 1000, 12).view(-1, 1, 1, 1))
    assert kept_filters(model, seed=5) == before


def test_layers_of_the_same_width_draw_apart() -> None:
    model = VGG([16, 16, 16], head="linear")
    scales = [f"features.{index}.weight" for index in (1, 4, 7)]
    with torch.no_grad():
        for name in scales:
            model.get_parameter(name).copy_(torch.arange(16.0))
    pruned = prune(model, "random", example=EXAMPLE, seed=0, ratio=0.5).model
    assert len({tuple(pruned.get_parameter(name).tolist()) for name in scales}) == 3


def test_every_unit_goes_equally_often() -> None:
    found = find_pruner("random")
    pruner = found(found.options_type.model_validate({"name": "random", "ratio": 0.25}))
    model, draws, size = small_vgg(), 2000, 12
    target = pruner.target(model, EXAMPLE)
    assert isinstance(target, ChannelTarget)
    gone = torch.zeros(size)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        scores = pruner.scores(model, target.groups, data=None, generator=generator)
        gone[target.choose(scores).drop["features.0"]] += 1
    assert gone.sum() == draws * size / 4
    # Binomial with p = 1 / 4: four standard deviations.
    assert (gone - draws / 4).abs().max() < 4 * (draws * 3 / 16) ** 0.5
