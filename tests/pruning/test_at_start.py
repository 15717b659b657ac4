"""Pruning at initialisation: SNIP, GraSP and SynFlow against their formulas, worked out in another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

from harness import configure
from rethink_prune import prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.files import conf_dir
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import PRUNERS, find_pruner
from rethink_prune.pruning.pruner import PruneResult

AT_START = ("snip", "grasp", "synflow")
LABELLED = ("snip", "grasp")
SHAPE = (3, 8, 8)
Data = list[tuple[torch.Tensor, torch.Tensor]]


def pruner_of(name: str, **options: Any) -> Any:
    found = find_pruner(name)
    return found(parse_pruner({"name": name, "ratio": 0.5, **options}, found.options_type))


def scores(name: str, model: nn.Module, data: Data | None, shape: tuple[int, ...] = SHAPE, **options: Any) -> Any:
    pruner = pruner_of(name, **options)
    target = pruner.target(model, torch.zeros(1, *shape))
    return pruner.scores(model, target, data=data, generator=torch.Generator())


def images(*sizes: int, shape: tuple[int, ...] = SHAPE, classes: int = 10) -> Data:
    generator = torch.Generator().manual_seed(5)
    draw = {"generator": generator, "dtype": torch.float64}
    labels = (torch.randint(classes, (size,), generator=generator) for size in sizes)
    return [(torch.randn(size, *shape, **draw), label) for size, label in zip(sizes, labels, strict=True)]  # type: ignore[call-overload]


def small() -> nn.Module:
    """Two convolutions, a batch norm with statistics and scales of its own, dropout and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(12, 10),
    ).double()
    with torch.no_grad():
        for name in ("1.weight", "1.bias"):
            model.get_parameter(name).uniform_(0.5, 1.5)
        model.get_buffer("1.running_mean").uniform_(-0.5, 0.5)
        model.get_buffer("1.running_var").uniform_(0.5, 1.5)
    return model


def two_logits(first: float, second: float) -> nn.Module:
    """One pixel times two weights: the logits of two classes."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten()).double()
    model.get_parameter("0.weight").data.copy_(torch.tensor([first, second]).view(2, 1, 1, 1))
    return model


PIXEL = [(torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0]))]


def single_factors(model: nn.Module, layer: str, step: float) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield for each weight of a layer two copies of the network: with it a little larger, and a little smaller."""
    for index in range(model.get_parameter(f"{layer}.weight").numel()):
        pair = (copy.deepcopy(model), copy.deepcopy(model))
        for network, factor in zip(pair, (1 + step, 1 - step), strict=True):
            network.get_parameter(f"{layer}.weight").data.view(-1)[index] *= factor
        yield pair


# ---- snip ------------------------------------------------------------------------------------------------


def test_snip_on_a_hand_count() -> None:
    # The gradients of the two logits are opposite, so the weights 1 and -2 have a third and two thirds of the sum.
    assert scores("snip", two_logits(1.0, -2.0), PIXEL, (1, 1, 1))["0"].tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("linear", [False, True])
def test_snip_is_the_derivative_of_the_loss_by_a_factor_on_each_weight(linear: bool) -> None:
    model, data = small().eval(), images(7, 5)
    found = scores("snip", model, data, linear=linear)

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        losses = [F.cross_entropy(network(pixels), labels, reduction="sum") for pixels, labels in data]
        return float(sum(losses)) / 12

    step = 1e-5
    expected = {
        layer: [abs(loss(more) - loss(less)) / (2 * step) for more, less in single_factors(model, layer, step)]
        for layer in ("0", "3", *(("6",) if linear else ()))
    }
    total = sum(sum(values) for values in expected.values())
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        assert found[layer].tolist() == pytest.approx([value / total for value in values], rel=1e-5, abs=1e-9)


def test_snip_refuses_a_network_without_gradients() -> None:
    with pytest.raises(UserError, match=r"pruner\.name=snip: every weight's gradient is zero"):
        scores("snip", two_logits(0.0, 0.0), PIXEL, (1, 1, 1))


# ---- grasp -----------------------------------------------------------------------------------------------


def test_grasp_on_a_hand_count() -> None:
    # Logits w / 200, p their softmax, label 0: g = (-p1, p1) / 200, H = p0 p1 ((1, -1), (-1, 1)) / 200^2.
    first, second = 30.0, -70.0
    p1 = 1 / (1 + math.exp((first - second) / 200))
    flow = 2 * (1 - p1) * p1 * p1 / 200**3
    data = [(images.repeat(2, 1, 1, 1), labels.repeat(2)) for images, labels in PIXEL]
    found = scores("grasp", two_logits(first, second), data, (1, 1, 1))["0"]
    assert found.tolist() == pytest.approx([-flow * first, flow * second])
    # Published: -w (H g) is flow * 30 and flow * 70, and the highest goes, although it is the larger weight.
    result = prune(two_logits(first, second), "grasp", example=PIXEL[0][0], data=data, ratio=0.4)
    assert result.model.get_parameter("0.weight").flatten().tolist() == [first, 0]


def gradient_flow(model: nn.Module, data: Data, layers: tuple[str, ...]) -> torch.Tensor:
    """Return the squared norm of the mean loss's gradient: dropout off, statistics of the batch, logits over 200."""
    network = copy.deepcopy(model).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    losses = [F.cross_entropy(network(pixels) / 200, labels, reduction="sum") for pixels, labels in data]
    total: Any = sum(losses)
    weights = [network.get_parameter(f"{layer}.weight") for layer in layers]
    parts = torch.autograd.grad(total / sum(len(labels) for _, labels in data), weights)
    return torch.stack([part.square().sum() for part in parts]).sum()


@pytest.mark.parametrize("linear", [False, True])
def test_grasp_is_half_the_change_of_the_gradients_norm_by_a_factor_on_each_weight(linear: bool) -> None:
    model, data, step = small(), images(7, 5), 1e-5
    layers = ("0", "3", *(("6",) if linear else ()))
    found = scores("grasp", model, data, linear=linear)
    assert tuple(found) == layers
    for layer in layers:
        flows = [
            [float(gradient_flow(network, data, layers)) for network in pair]
            for pair in single_factors(model, layer, step)
        ]
        expected = torch.tensor([(more - less) / (2 * step) / 2 for more, less in flows], dtype=torch.float64)
        assert torch.allclose(found[layer], expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def test_grasp_leaves_out_a_last_image_that_is_alone() -> None:
    model, data = small(), images(6, 4)
    apart = [*data, (data[0][0][:1], data[0][1][:1])]
    first, second = scores("grasp", model, data), scores("grasp", model, apart)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="grasp needs batches of two images or more"):
        scores("grasp", model, [(pixels[:1], labels[:1]) for pixels, labels in data])


# ---- synflow ---------------------------------------------------------------------------------------------


def chain() -> nn.Module:
    """Two layers of 1 x 1 convolutions: 2 inputs, 2 channels, 1 output."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    model.get_parameter("0.weight").data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]).view(2, 2, 1, 1))
    model.get_parameter("2.weight").data.copy_(torch.tensor([[-5.0, 0.5]]).view(1, 2, 1, 1))
    return model


def test_synflow_on_a_hand_count() -> None:
    # Each weight's score is the sum of the products along the paths through it: 1 * 5, 2 * 5, 3 * .5, 4 * .5.
    found = scores("synflow", chain(), None, (2, 1, 1), iterations=1)
    assert found["0"].tolist() == [5, 10, 1.5, 2]
    assert found["2"].tolist() == [15, 3.5]


def test_synflow_ranks_anew_what_stays_after_each_step() -> None:
    # Of 6 weights, (1 / 4)^(1 / 2) = half go in the first step: index 3 in 1.5 2 3.5 5 10 15 is the 5.
    found = scores("synflow", chain(), None, (2, 1, 1), iterations=2, ratio=0.75)
    assert found["0"].tolist() == [-1, 10, -1, -1]
    # The last layer's second weight leads nowhere any more; its layer has the other one.
    assert found["2"].tolist() == [10, -1]


def test_synflow_as_published_on_a_network_with_batch_norms() -> None:
    torch.manual_seed(1)
    model, ratio, iterations = VGG((6, "M", 8, 8), hidden_features=16), 0.9, 7
    network = copy.deepcopy(model).double().eval()
    for tensor in network.state_dict().values():
        tensor.abs_()
    convolutions = {n: m.get_parameter("weight") for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    masks = {name: torch.ones_like(weight) for name, weight in convolutions.items()}
    for step in range(1, iterations + 1):
        for name, weight in convolutions.items():
            weight.data.mul_(masks[name])
        network.zero_grad()
        network(torch.ones(1, *SHAPE, dtype=torch.float64)).sum().backward()
        values = {name: (w.detach() * w.grad).abs() for name, w in convolutions.items() if w.grad is not None}
        ordered = torch.cat([value.flatten() for value in values.values()]).sort().values
        threshold = ordered[int(len(ordered) * (1 - (1 - ratio) ** (step / iterations)))]
        masks = {name: (value > threshold).double() for name, value in values.items()}
    result = prune(model, "synflow", example=torch.zeros(1, *SHAPE), ratio=ratio, iterations=iterations)
    for name, mask in masks.items():
        assert torch.equal(result.architecture.masks[f"{name}.weight"], mask.bool()), name


def test_synflow_says_if_the_sum_overflows() -> None:
    model = chain()
    model.get_parameter("0.weight").data.fill_(3e38)
    model.get_parameter("2.weight").data.fill_(3e38)
    layers = [layer for _ in range(5) for layer in (copy.deepcopy(model), nn.Conv2d(1, 2, 1))]
    with pytest.raises(UserError, match=r"pruner\.name=synflow: the sum of the outputs is too large"):
        scores("synflow", nn.Sequential(*layers), None, (2, 1, 1))


# ---- all three -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AT_START)
def test_they_prune_before_any_training_and_once(name: str) -> None:
    assert PRUNERS[name].at_start
    assert not PRUNERS[name].in_rounds
    assert "before any training" in PRUNERS[name].no_rounds
    assert {other for other in PRUNERS if PRUNERS[other].at_start} == set(AT_START)


def pruned(name: str, model: nn.Module, **options: Any) -> PruneResult:
    data = [(pixels.float(), labels) for pixels, labels in images(20, 13)]
    few = {"iterations": 5} if name == "synflow" else {}
    return prune(model, name, example=torch.zeros(1, *SHAPE), data=data, **{"ratio": 0.6, **few, **options})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*AT_START, "taylor"])
def test_the_network_stays_as_it_is_and_the_result_does_not_depend_on_its_mode(name: str, training: bool) -> None:
    model = small().float().train(training)
    model.get_parameter("3.weight").requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    result = pruned(name, model, **({"ratio": 0.5} if name == "taylor" else {}))
    assert torch.equal(torch.get_rng_state(), drawn), "nothing is drawn, so nothing can differ in a second run"
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_parameter("3.weight").requires_grad
    other = pruned(name, small().float().train(not training), **({"ratio": 0.5} if name == "taylor" else {}))
    assert result.report == other.report
    assert all(torch.equal(m, other.architecture.masks[key]) for key, m in result.architecture.masks.items())
    states = result.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("name", AT_START)
def test_skipped_layers_stay_whole_and_a_minimum_share_holds(name: str) -> None:
    torch.manual_seed(3)
    model = ResNet(8)
    result = pruned(name, model, ratio=0.9, skip=["conv1"], min_share=0.02)
    kept = {layer.layer: (layer.kept, layer.full) for layer in result.report.layers}
    assert kept["conv1"] == (432, 432)
    assert all(count >= math.ceil(0.02 * size) for count, size in kept.values())
    others = [counts for layer, counts in kept.items() if layer != "conv1"]
    assert sum(count for count, _ in others) == pytest.approx(0.1 * sum(size for _, size in others), rel=0.1)


@pytest.mark.parametrize("name", AT_START)
def test_a_layer_that_would_be_emptied_keeps_its_best_weight_and_is_named(name: str) -> None:
    model = small().float()
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(1e-6)
        model.get_parameter("3.weight").view(-1)[5] = 1e-3
    result = pruned(name, model, ratio=0.9, linear=True)
    for layer in result.report.layers:
        mask = result.architecture.masks[f"{layer.layer}.weight"]
        assert mask.sum() == layer.kept >= 1
        named = f"{layer.layer}: the threshold would have emptied it; its best weight stays"
        if layer.kept == 1:
            assert named in result.report.warnings


@pytest.mark.parametrize("name", [*LABELLED, "taylor"])
def test_all_images_are_read_if_there_are_fewer(name: str) -> None:
    model, data = small(), images(7, 5)
    if name == "taylor":
        results = [
            prune(model, name, example=data[0][0][:1], data=data, ratio=0.5, images=count).model.state_dict()
            for count in (12, 5000)
        ]
    else:
        results = [scores(name, model, data, images=count) for count in (12, 5000)]
        assert any(not torch.equal(v, scores(name, model, data, images=7)[n]) for n, v in results[0].items())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "an iterator": (lambda: iter(images(4)), "data: must be batches of .* that can be read many times"),
    "nothing": (list, "data: holds no images"),
    "other images": (
        lambda: images(4, shape=(3, 9, 9)),
        "data: its images are 3 x 9 x 9, but the network was analysed",
    ),
    "no labels": (lambda: [pixels for pixels, _ in images(4)], "data: a batch must be a pair of images and labels"),
    "probabilities": (lambda: [(p, torch.ones(4, 10)) for p, _ in images(4)], "data: labels must be one class number"),
    "numbers": (lambda: [(p, torch.ones(4)) for p, _ in images(4)], "data: labels must be one class number"),
    "too few": (lambda: [(p, y[:3]) for p, y in images(4)], "data: labels must be one class number"),
    "too large": (lambda: images(40, classes=30), "data: labels must be from 0 to 9: the network has 10 classes"),
}


@pytest.mark.parametrize("name", [*LABELLED, "taylor"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_do_not_fit_are_refused(name: str, case: str) -> None:
    data, message = BAD_DATA[case]
    with pytest.raises(UserError, match=message):
        prune(small(), name, example=torch.zeros(1, *SHAPE), data=data(), ratio=0.5)


@pytest.mark.parametrize("name", [*AT_START, "taylor", "fpgm"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    model = small()
    model.get_parameter("3.weight").data.view(-1)[2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        prune(model, name, example=torch.zeros(1, *SHAPE), data=images(4), ratio=0.5)
    pruner = pruner_of(name)
    target = pruner.target(model, torch.zeros(1, *SHAPE))
    if name != "fpgm":
        with pytest.raises(UserError, match="finite"):
            pruner.prune(model, target, data=images(4), generator=torch.Generator())


@pytest.mark.parametrize("name", AT_START)
def test_their_files_state_the_arms_and_the_command_line_still_decides(name: str) -> None:
    def composed(*overrides: str) -> Any:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    assert composed(f"pruner={name}").arms == ["scratch_e", "lottery"]
    assert composed(f"pruner={name}", "arms=[scratch_b]").arms == ["scratch_b"]
    assert composed("experiment=budget_axis_digits", f"pruner={name}").arms[0] == "finetune", (
        "an experiment has its own"
    )
    assert composed("pruner=l1").arms == ["finetune", "scratch_e", "scratch_b"]
    options = configure(f"pruner={name}", "arms=[scratch_e]", "pruner.ratio=0.9").pruner
    assert options == parse_pruner({"name": name, "ratio": 0.9}, find_pruner(name).options_type)
