"""FPGM: the filters that the others of their layer can replace go, whatever their norms are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness import randomise
from rethink_prune import build_model, prune
from rethink_prune.config import parse_pruner
from rethink_prune.models.resnet import ResNet
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.fpgm import sums_of_distances


def with_filters(*filters: tuple[float, float]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, len(filters), 1), nn.ReLU(), nn.Conv2d(len(filters), 1, 1))
    model.get_parameter("0.weight").data.copy_(torch.tensor(filters).view(len(filters), 2, 1, 1))
    return model


def kept(model: nn.Module, ratio: float) -> list[list[float]]:
    result = prune(model, "fpgm", example=torch.zeros(1, 2, 3, 3), ratio=ratio)
    return result.model.get_parameter("0.weight").flatten(1).tolist()


def test_the_middle_goes_not_the_smallest() -> None:
    # Sums of distances: (0, 0): 5 + 10 + 15 = 30, (3, 4): 5 + 5 + 10 = 20, (6, 8): 10 + 5 + 5 = 20, (9, 12): 30.
    model = with_filters((0, 0), (3, 4), (6, 8), (9, 12))
    assert kept(model, 0.5) == [[0, 0], [9, 12]]
    assert kept(model, 0.25) == [[0, 0], [3, 4], [9, 12]], "of equal sums, the lower index stays"


def test_sums_agree_with_a_plain_loop_and_do_not_round_small_distances_away() -> None:
    generator = torch.Generator().manual_seed(0)
    filters = 1000 + 1e-6 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    expected = [sum(float((a - b).square().sum().sqrt()) for b in filters) for a in filters]
    assert sums_of_distances(filters).tolist() == pytest.approx(expected, rel=1e-6)


def test_units_of_several_layers_sum_and_global_ranking_divides_by_the_layers_mean() -> None:
    model = randomise(ResNet(8))
    found = find_pruner("fpgm")
    for ranking in ("layer", "global"):
        options = {"name": "fpgm", "ratio": 0.5, "scope": "all", "ranking": ranking}
        pruner = found(parse_pruner(options, found.options_type))
        target = pruner.target(model, torch.zeros(1, 3, 16, 16))
        scores = pruner.scores(model, target.groups, data=None, generator=torch.Generator())
        tied = next(group for group in target.groups if len(group.layers) > 1)
        sums = {n: sums_of_distances(model.get_parameter(f"{n}.weight").detach().flatten(1)) for n in tied.layers}
        if ranking == "global":
            sums = {name: values / values.mean() for name, values in sums.items()}
        for index, unit in enumerate(tied.units):
            parts = torch.cat([sums[name][list(places)] for name, places in unit.items()])
            expected = parts.mean() if ranking == "global" else parts.sum()
            assert float(scores[tied.name][index]) == pytest.approx(float(expected))


def test_widths_are_those_of_l1_with_the_same_options() -> None:
    model = build_model("resnet20")
    example = torch.zeros(1, 3, 16, 16)
    by_median, by_norm = (prune(model, name, example=example, ratio=0.35) for name in ("fpgm", "l1"))
    assert by_median.report.layers == by_norm.report.layers
