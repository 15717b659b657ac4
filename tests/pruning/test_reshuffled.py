"""An architecture of the same cost at random positions: the control of tickets, of every pruner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from harness import randomise
from rethink_prune import count_cost
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.models.densenet import DenseNet
from rethink_prune.models.preresnet import PreResNet
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import PRUNERS, find_pruner
from rethink_prune.pruning.pruner import LayerWidth, PruneResult, Target
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

SHAPE = (3, 16, 16)
NETWORKS = {
    "vgg": lambda: VGG((8, "M", 16, 16), hidden_features=16),
    "resnet": lambda: ResNet(14),
    "preresnet": lambda: PreResNet(20),
    "densenet": lambda: DenseNet(10, growth_rate=4),
    "resnext": lambda: ResNeXt(20, cardinality=4, base_width=4),
}


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(100, *SHAPE, generator=generator, dtype=torch.float64), torch.arange(100) % 10)]


def pruned(pruner: str, network: str, **options: Any) -> tuple[Target, PruneResult]:
    model = randomise(NETWORKS[network]())
    found = find_pruner(pruner)
    chosen = found(parse_pruner({"name": pruner, **options}, found.options_type))
    target = chosen.target(model, torch.zeros(1, *SHAPE), network)
    if pruner == "sss":
        # What its training does: every third structure loses its first quarter; blocks go as a whole.
        for structure in target.structures[1::3]:
            for unit in structure.units[: max(1, len(structure.units) // 4)]:
                for tensor in model.get_submodule(structure.module).parameters(recurse=False):
                    tensor.data[list(unit)] = 0.0
    return target, chosen.prune(model, target, data=images(), generator=torch.Generator().manual_seed(0))


def cost(target: Target, architecture: Architecture) -> object:
    return count_cost(reshape(target.shapes, architecture), SHAPE, masks=architecture.masks)


def reshuffle(target: Target, result: PruneResult, seed: int = 0) -> Architecture:
    return target.reshuffled(result.report.layers, torch.Generator().manual_seed(seed))


def same(first: Architecture, second: Architecture) -> bool:
    def tensors(architecture: Architecture) -> Mapping[str, torch.Tensor]:
        return {**architecture.masks, **{f"{n}.selected": t for n, t in architecture.selections.items()}}

    here, there = tensors(first), tensors(second)
    parts = [(a.modules, a.edits, a.removed) for a in (first, second)]
    return parts[0] == parts[1] and here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


@pytest.mark.parametrize("network", ["resnet", "preresnet"])
@pytest.mark.parametrize(
    "pruner",
    [
        pytest.param(name, marks=() if name in ("l1", "magnitude", "soft_filter") else pytest.mark.slow)
        for name in PRUNERS
        if name not in ("sss", "regression", "guided")
    ],
)
def test_it_costs_the_same(pruner: str, network: str) -> None:
    more: dict[str, Any] = {"entries_per_image": 20} if pruner == "thinet" else {}
    target, result = pruned(pruner, network, ratio=0.5, **more)
    again = reshuffle(target, result)
    assert cost(target, again) == cost(target, result.architecture) != target.full_cost
    assert again.modules == result.architecture.modules
    assert same(again, reshuffle(target, result)), "the generator decides"


def test_selections_of_inputs_and_filter_masks_are_drawn_anew() -> None:
    options: dict[str, dict[str, Any]] = {
        "slimming": {"ratio": 0.4},
        "regression": {"ratio": 0.5, "positions_per_image": 20},
        "soft_filter": {"ratio": 0.4, "scope": "all"},
    }
    for pruner, chosen in options.items():
        target, result = pruned(pruner, "preresnet", **chosen)
        first, second = reshuffle(target, result), reshuffle(target, result, seed=1)
        assert result.architecture.selections or result.architecture.masks
        assert cost(target, first) == cost(target, result.architecture)
        assert not same(first, second)
        assert not same(first, result.architecture)


def test_groups_that_keep_all_stay_whole() -> None:
    target, result = pruned("l1", "resnet", ratio={"layer2.*": 0.5}, scope="all")
    assert reshuffle(target, result).modules == result.architecture.modules


def test_every_position_of_a_weight_is_drawn_equally_often() -> None:
    target, _ = pruned("magnitude", "vgg", ratio=0.5)
    layers = [LayerWidth("features.0", 54, 216)]
    drawn = torch.zeros(8, 3, 3, 3)
    for seed in range(400):
        masks = target.reshuffled(layers, torch.Generator().manual_seed(seed)).masks
        assert int(masks["features.0.weight"].sum()) == 54
        drawn += masks["features.0.weight"]
    # Binomial with p = 1 / 4: five standard deviations.
    assert (drawn - 100).abs().max() < 5 * (400 * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("resnet", {"structures": ["blocks", "channels"]}),
        ("vgg", {}),
        *(
            pytest.param(network, options, marks=pytest.mark.slow)
            for network, options in [
                ("resnet", {}),
                ("preresnet", {"structures": ["blocks", "channels"]}),
                ("resnext", {}),
                ("resnext", {"structures": ["blocks", "groups", "channels"]}),
            ]
        ),
    ],
)
def test_sss_costs_the_same(network: str, options: dict[str, Any]) -> None:
    target, result = pruned("sss", network, **options)
    for seed in range(3):
        assert cost(target, reshuffle(target, result, seed)) == cost(target, result.architecture) != target.full_cost


def test_sss_draws_blocks_within_a_stage_and_leaves_the_first_which_changes_the_shape() -> None:
    target, _ = pruned("sss", "resnet")
    ends = [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3) for block in (0, 1)]
    layers = [LayerWidth(name, int(name not in ("layer1.1.bn2", "layer3.0.bn2")), 1) for name in ends]
    gone = Counter(
        name for seed in range(16) for name in target.reshuffled(layers, torch.Generator().manual_seed(seed)).removed
    )
    # Both blocks of the first stage are alike. Those of the last are not: its first reads half of the channels.
    assert gone["layer1.0.bn2"] + gone["layer1.1.bn2"] == 16
    assert 2 < gone["layer1.0.bn2"] < 14
    assert gone["layer3.0.bn2"] == 16
    assert len(gone) == 3


def test_a_block_takes_the_widths_of_the_one_whose_place_it_takes() -> None:
    target, _ = pruned("sss", "resnet", structures=["blocks", "channels"])
    found: Any = target
    whole = {s.name: len(s.units) for s in found.structures}
    kept = whole | {"layer1.1.bn2": 0, "layer1.1.conv1": 0, "layer1.0.conv1": 5}
    layers = [LayerWidth(name, kept[name], size) for name, size in whole.items()]
    seen = set()
    for seed in range(4):
        architecture = target.reshuffled(layers, torch.Generator().manual_seed(seed))
        (removed,) = architecture.removed
        other = {"layer1.0.bn2": "layer1.1", "layer1.1.bn2": "layer1.0"}[removed]
        assert architecture.modules[f"{other}.conv1"]["out_channels"] == 5
        assert cost(target, architecture) == cost(target, target.reshuffled(layers, torch.Generator().manual_seed(99)))
        seen.add(removed)
    assert len(seen) == 2


def test_a_pruner_that_does_not_define_it_says_so() -> None:
    class Nothing(Target):
        known = False

        def architecture(self) -> Architecture:
            return Architecture()

        def report(self) -> Any:
            return None

    target = Nothing(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, *SHAPE))
    with pytest.raises(UserError, match=r"Nothing: does not define reshuffled\(\)"):
        target.reshuffled([], torch.Generator())
