"""What holds for every pruner on every family of networks: exact removal, and rebuilding from data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from harness import mask, randomise
from rethink_prune import build_model, count_cost, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.models.densenet import DenseNet
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.models.preresnet import PreResNet
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import PRUNERS, ChannelPruner, find_pruner
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.weight_pruner import WeightPruner
from rethink_prune.seeds import derive_generator
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

IMAGE = (2, 3, 16, 16)
# Every family, as small as it comes.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: VGG((8, "M", 16, 16, "M", 24), hidden_features=16),
    "vgg, linear head": lambda: VGG((8, "M", 16, 16, "M", 24), head="linear", conv_bias=True),
    "resnet": lambda: ResNet(8),
    "preresnet": lambda: PreResNet(11),
    "densenet": lambda: DenseNet(10, growth_rate=4),
    "densenet, bottleneck": lambda: DenseNet(16, growth_rate=4, bottleneck=True, compression=0.5),
    "resnext": lambda: ResNeXt(11, cardinality=4, base_width=4),
}
# Slow ones, and those that score or cut as another does.
LONG = {"regression", "synflow", "grasp", "snip", "lamp", "fpgm", "taylor", "random", "torch_pruning"}


def marked(names: set[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in sorted(names)]


# Every pruner that a ratio or a cost is given to.
GIVEN_A_TARGET = marked(set(PRUNERS) - {"sss", "guided"})
SCORING = [name for name, found in PRUNERS.items() if issubclass(found, ChannelPruner)]


def build(network: str) -> nn.Module:
    return randomise(NETWORKS[network]())


def images(count: int = 100) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, *IMAGE[1:], generator=generator, dtype=torch.float64)
    return [(pixels, torch.zeros(count, dtype=torch.int64))]


def zero_some_structures(model: nn.Module) -> None:
    """Leave what the training of sss does: modules of which the first quarter of the outputs is zero, or one block."""
    chosen = find_pruner("sss")
    target: Any = chosen(parse_pruner({"name": "sss"}, chosen.options_type)).target(model, images()[0][0][:1])
    for structure in target.structures[:: 1 if len(target.structures[0].units) > 1 else 2]:
        module = model.get_submodule(structure.module)
        for unit in structure.units[: max(1, len(structure.units) // 4)]:
            for tensor in module.parameters(recurse=False):
                tensor.data[list(unit)] = 0.0


def options_for(pruner: str) -> dict[str, Any]:
    return {
        "sss": {},
        "thinet": {"ratio": 0.5, "entries_per_image": 20},
        "regression": {"ratio": 0.5, "positions_per_image": 20},
        "synflow": {"ratio": 0.5, "iterations": 10},
        **{name: {"ratio": 0.5, "images": 10} for name in ("snip", "grasp", "taylor", "torch_pruning")},
    }.get(pruner, {"ratio": 0.5})


def test_no_pruner_inherits_what_it_cannot_use() -> None:
    of_weights = {name for name, found in PRUNERS.items() if issubclass(found, WeightPruner)}
    assert {name for name in PRUNERS if hasattr(PRUNERS[name], "scores")} == {*SCORING, *of_weights}
    assert {"l1", "slimming", "soft_filter", "taylor", "fpgm", "random", "torch_pruning"} == set(SCORING)
    assert of_weights == {"magnitude", "lamp", "snip", "grasp", "synflow"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pruner", SCORING)
def test_pruned_equals_masked(pruner: str, network: str) -> None:
    model, x = build(network), images()[0][0][:4]
    found = find_pruner(pruner)
    chosen = found(parse_pruner({"name": pruner, "ratio": 0.5}, found.options_type))
    target: Any = chosen.target(model, x, network)
    scores = chosen.scores(model, target.groups, data=images(10), generator=derive_generator(0, "prune"))
    choice = target.choose(scores)
    result = target.cut(model, choice)
    with torch.no_grad():
        before, masked, pruned = model(x), mask(model, target.channels, choice.drop)(x), result.model(x)
    assert (masked - pruned).abs().max() < 1e-10
    assert (masked - before).abs().max() > 1e-6, "masking changed nothing, so the comparison shows nothing"
    assert sum(layer.kept for layer in result.report.layers) < sum(layer.full for layer in result.report.layers)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pruner", marked(set(PRUNERS) - {"guided"}))  # which needs networks that others pruned
def test_rebuilt_from_its_files_it_is_the_same_network(pruner: str, network: str, tmp_path: Path) -> None:
    if (pruner, network) == ("sss", "densenet"):
        pytest.skip("several layers normalise each of its channels in their own way: no factor can sit there")
    model, x = build(network), images()[0][0]
    if pruner == "sss":
        zero_some_structures(model)
    result = prune(model, pruner, example=x[:1], data=images(), **options_for(pruner))
    result.architecture.save(tmp_path)

    architecture = Architecture.load(tmp_path)
    rebuilt = reshape(NETWORKS[network](), architecture).double().eval()
    rebuilt.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(x), result.model.eval()(x))
    assert sum(layer.kept for layer in result.report.layers) < sum(layer.full for layer in result.report.layers)

    # A scratch network has the same shapes, every weight drawn anew, and trains.
    scratch = reshape(NETWORKS[network](), architecture)
    before = {name: parameter.detach().clone() for name, parameter in scratch.named_parameters()}
    INITIALISERS[family_initialiser(NETWORKS[network]()) or ""](scratch)
    assert {name: p.shape for name, p in scratch.named_parameters()} == {
        name: p.shape for name, p in result.model.named_parameters()
    }
    for name, parameter in scratch.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, before[name]), name
    scratch.train()(x.float()).sum().backward()
    assert all(parameter.grad is not None for parameter in scratch.parameters())


@pytest.mark.parametrize("pruner", GIVEN_A_TARGET)
def test_torchvision_networks_by_import_path(pruner: str) -> None:
    model = randomise(models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)).float()
    data = [(pixels.float(), labels) for pixels, labels in images(600)]
    result = prune(model, pruner, example=data[0][0][:1], data=data, **options_for(pruner))
    assert result.model(data[0][0][:2]).shape == (2, 5)
    assert sum(layer.kept for layer in result.report.layers) < sum(layer.full for layer in result.report.layers)
    if not issubclass(PRUNERS[pruner], WeightPruner):
        assert "fc" in result.report.frozen, "what stays whole is listed"


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if PRUNERS[name].needs_data])
def test_pruners_that_look_at_images_say_so(pruner: str) -> None:
    with pytest.raises(UserError, match=f"pruner.name={pruner}: needs training images"):
        prune(build_model("resnet20"), pruner, example=torch.randn(1, 3, 32, 32), ratio=0.5)


@pytest.mark.parametrize("target", [{"target_macs": 0.6}, {"target_params": 0.6}])
@pytest.mark.parametrize("pruner", GIVEN_A_TARGET)
def test_targets_for_the_whole_network_are_met(pruner: str, target: dict[str, float]) -> None:
    model = ResNet(20)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    found = find_pruner(pruner)
    few = {"synflow": {"iterations": 10}, "grasp": {"images": 10}}.get(pruner, {})
    chosen = found(parse_pruner({"name": pruner, **target, **few}, found.options_type))
    whole = chosen.target(model, torch.randn(1, 3, 16, 16), "resnet20")
    data = [(pixels.float(), labels) for pixels, labels in images()]
    result = chosen.prune(model, whole, data=data, generator=derive_generator(0, "prune"))
    cost = count_cost(result.model, (3, 16, 16), masks=result.architecture.masks)
    (name,) = target
    quantity = name.removeprefix("target_")
    assert getattr(cost, quantity) == pytest.approx(0.6 * getattr(whole.full_cost, quantity), rel=0.01)
    if isinstance(whole, ChannelTarget) and whole.known:
        assert cost == whole.cost, "what was planned is what came out"
