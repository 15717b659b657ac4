"""ThiNet: its greedy choice and scales by definition, and the networks it leaves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import mask
from rethink_prune import build_model
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.models.vgg import VGG16GAP
from rethink_prune.pruning.channel_pruner import Choice
from rethink_prune.pruning.thinet import ThiNet, choose_greedily, least_squares_scales

EXAMPLE = torch.zeros(1, 3, 32, 32)


def thinet(**options: Any) -> ThiNet:
    return ThiNet(parse_pruner({"name": "thinet", **options}, ThiNet.options_type))


def batches(count: int = 40, size: int = 32, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Smooth random images, whose channels and neighbours are correlated as those of photographs."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=dtype)
    images = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return [(part, torch.zeros(len(part))) for part in images.split(16)]


def greedy_by_definition(x: np.ndarray[Any, Any], count: int) -> list[int]:
    """The published loop: every candidate tried, the sum of squares computed from the samples."""
    removed: list[int] = []
    while len(removed) < count:
        errors = {}
        for candidate in range(x.shape[1]):
            if candidate not in removed:
                errors[candidate] = sum(sum(row[j] for j in [*removed, candidate]) ** 2 for row in x)
        removed.append(min(errors, key=errors.__getitem__))
    return removed


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_published_greedy_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, 9)) @ rng.normal(size=(9, 9)) + rng.normal(size=9)
    assert choose_greedily(x.T @ x, 6) == greedy_by_definition(x, 6)


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_error_is_bounded_by_the_exhaustive_best_and_the_scales_only_improve_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 8)) + rng.normal(size=(40, 1))
    gram = x.T @ x

    def error(dropped: Sequence[int]) -> float:
        return float((x[:, list(dropped)].sum(1) ** 2).sum())

    chosen = choose_greedily(gram, 4)
    every = [error(dropped) for dropped in itertools.combinations(range(8), 4)]
    assert min(every) * (1 - 1e-12) <= error(chosen) < np.mean(every)

    scales, kept = least_squares_scales(gram, chosen), sorted(set(range(8)) - set(chosen))
    assert not scales[chosen].any()
    np.testing.assert_allclose(scales[kept], np.linalg.lstsq(x[:, kept], x.sum(1), rcond=None)[0], rtol=1e-8)
    assert ((x @ scales - x.sum(1)) ** 2).sum() <= error(chosen)


def test_of_many_best_scales_those_nearest_to_one_are_taken() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    x = np.hstack([x, x[:, :1], np.zeros((20, 1))])  # a duplicate and a channel the sample saw nothing of are kept
    scales, kept = least_squares_scales(x.T @ x, [1]), [0, 2, 3, 4]
    np.testing.assert_allclose(scales[kept], 1 + np.linalg.lstsq(x[:, kept], x[:, 1], rcond=None)[0])
    assert scales[4] == pytest.approx(1)
    assert (least_squares_scales(np.zeros((3, 3)), [0]) == [0, 1, 1]).all()


def randomised_norms(model: nn.Module) -> nn.Module:
    """Float64, with batch norms that shift and scale."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                tensor.detach().add_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


@pytest.mark.parametrize("network", ["vgg11", "resnet20", "preresnet20"])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_the_pruned_network_is_the_rescaled_one_with_channels_masked(network: str, scope: str) -> None:
    model = randomised_norms(build_model(network))
    data = batches(8, dtype=torch.float64)
    pruner = thinet(ratio=0.5, entries_per_image=65, scope=scope)
    target = pruner.target(model, EXAMPLE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full, drop = pruner.reconstruct(
        model, target, pruner.sampled(data, target), generator=torch.Generator().manual_seed(0)
    )
    pruned = pruner.prune(model, target, data=data, generator=torch.Generator().manual_seed(0)).model
    with torch.no_grad():
        expected = mask(full, target.channels, drop)(data[0][0])
        assert (pruned(data[0][0]) - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)
    assert {name: len(units) for name, units in drop.items()} == {
        group.name: group.size - target.widths[group.name] for group in target.groups
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def two_convs(channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )


def test_channels_that_contribute_nothing_go_first_and_the_output_stays() -> None:
    model = two_convs().double()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = -1.0  # ReLU makes it zero
        model[2].weight[:, 6] = 0  # nobody reads it
    pruner = thinet(widths={"0": 6})
    target = pruner.target(model, torch.zeros(1, 3, 8, 8))
    data = batches(size=8, dtype=torch.float64)
    _, drop = pruner.reconstruct(
        model, target, pruner.sampled(data, target), generator=torch.Generator().manual_seed(0)
    )
    assert drop == {"0": [3, 6]}
    result = pruner.prune(model, target, data=data, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (result.model(data[0][0]) - model(data[0][0])).abs().max() < 1e-8


def test_a_channel_that_another_replaces_up_to_a_factor_is_made_up_for() -> None:
    model = two_convs(4).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[1] / 20, model[0].bias[1] / 20
        model[2].weight[:, 2] = model[2].weight[:, 1]
    pruner = thinet(widths={"0": 3})
    data = batches(size=8, dtype=torch.float64)
    target = pruner.target(model, torch.zeros(1, 3, 8, 8))
    full, drop = pruner.reconstruct(
        model, target, pruner.sampled(data, target), generator=torch.Generator().manual_seed(0)
    )
    assert drop == {"0": [2]}
    assert torch.allclose(full.get_parameter("2.weight")[:, 1], model[2].weight[:, 1] * 1.05, atol=1e-8)
    pruned = target.cut(full, Choice(drop)).model
    with torch.no_grad():
        assert (pruned(data[0][0]) - model(data[0][0])).abs().max() < 1e-8


def test_the_same_seed_gives_the_same_network_and_layers_left_whole_are_untouched() -> None:
    model = build_model("vgg11")
    pruner = thinet(ratio={"features.0": 0.5}, images=20)
    target = pruner.target(model, EXAMPLE)
    states = [
        pruner.prune(model, target, data=batches(), generator=torch.Generator().manual_seed(seed)).model.state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(states[0].get(name), tensor)}
    assert {name.split(".")[1] for name in changed} <= {"0", "1", "4"}  # conv, its norm, the next conv


def test_the_output_changes_less_than_with_random_channels() -> None:
    model = build_model("vgg11").eval()
    data = batches()
    pruner = thinet(ratio=0.3, images=40, entries_per_image=20)
    target = pruner.target(model, EXAMPLE)
    pruned = pruner.prune(model, target, data=data, generator=torch.Generator().manual_seed(0)).model
    with torch.no_grad():
        images = data[-1][0]
        error = (pruned(images) - model(images)).norm()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            drop = {
                group.name: torch.randperm(group.size, generator=generator)[target.widths[group.name] :].tolist()
                for group in target.groups
            }
            assert error < 0.7 * (target.cut(model, Choice(drop)).model(images) - model(images)).norm()


def test_published_variants() -> None:
    with torch.device("meta"):
        vgg, gap, resnet = torchvision.models.vgg16(), VGG16GAP(), torchvision.models.resnet50()
    example = torch.zeros(1, 3, 224, 224)

    def widths(model: nn.Module, network: str, variant: Any) -> list[int]:
        target = thinet(variant=variant).target(model, example, network)
        return [layer.kept for layer in target.report().layers]

    conv = [32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512]
    assert widths(vgg, "torchvision.models:vgg16", "conv") == conv
    assert widths(gap, "vgg16_gap", "gap") == conv
    assert widths(gap, "vgg16_gap", "tiny") == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 256]
    inner = [19] * 6 + [38] * 8 + [76] * 12 + [153] * 6  # after the stem, which stays whole
    assert widths(resnet, "torchvision.models:resnet50", 30) == [64, *inner]


def test_too_few_images_are_refused_before_and_while_pruning() -> None:
    model = build_model("vgg11")
    pruner = thinet(ratio=0.5, entries_per_image=3)
    target = pruner.target(model, EXAMPLE)
    pruner.check_images(target, 171)
    message = r"pruner.entries_per_image=3: with 170 images .* 512 channels of features.* the number of training images"
    with pytest.raises(UserError, match=message):
        pruner.check_images(target, 170)
    with pytest.raises(UserError, match=r"raise it or pruner\.images"):
        thinet(ratio=0.5, images=10).check_images(target, 1000)
    with pytest.raises(UserError, match="too few for the 64 channels of features"):
        pruner.prune(model, target, data=batches(20), generator=torch.Generator())


def test_weights_that_are_not_finite_are_refused_by_layer() -> None:
    model = build_model("vgg11")
    with torch.no_grad():
        model.get_parameter("features.4.weight")[0, 0, 0, 0] = float("nan")
    pruner = thinet(ratio=0.5)
    with pytest.raises(UserError, match=r"features\.4: its weights or what it reads are not finite"):
        pruner.prune(model, pruner.target(model, EXAMPLE), data=batches(), generator=torch.Generator())


def test_ranking_all_channels_together_is_refused() -> None:
    with pytest.raises(UserError, match="ranking"):
        thinet(ratio=0.5, ranking="global")


def test_a_network_of_three_dimensions_is_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 6, 3), nn.ReLU(), nn.Conv3d(6, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.randn(40, 3, 5, 5, 5), torch.zeros(40))]
    pruner = thinet(ratio=0.5)
    result = pruner.prune(
        model, pruner.target(model, torch.zeros(1, 3, 5, 5, 5)), data=data, generator=torch.Generator().manual_seed(0)
    )
    assert result.model(data[0][0]).shape == (40, 2)
    assert result.report.layers[0].kept == 3
