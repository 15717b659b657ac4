"""Taylor importance: the squared derivative of the loss by a gate on each filter, averaged over batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import randomise
from rethink_prune import prune
from rethink_prune.config import parse_pruner
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import find_pruner

SHAPE = (3, 16, 16)


def images(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(n, *SHAPE, **draw), torch.randint(10, (n,), generator=generator)) for n in sizes]


def found_scores(model: nn.Module, data: Any, **options: Any) -> tuple[Any, Any]:
    found = find_pruner("taylor")
    pruner: Any = found(parse_pruner({"name": "taylor", "ratio": 0.5, **options}, found.options_type))
    target = pruner.target(model, torch.zeros(1, *SHAPE))
    return target, pruner.scores(model, target.groups, data=data, generator=torch.Generator())


def test_the_score_on_a_hand_count() -> None:
    # Two channels of one pixel, x = 1: z = (2 * 3 + 1, -4 * 5), label 0. The gradient by z0 is -p1, by z1 p1.
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten()).double()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([2.0, -4.0]).view(2, 1, 1, 1))
        model.get_parameter("0.bias").copy_(torch.tensor([1 / 3, 0.0]))
        model.get_parameter("1.weight").copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0]]).view(2, 2, 1, 1))
    found = find_pruner("taylor")
    pruner: Any = found(parse_pruner({"name": "taylor", "ratio": 0.5}, found.options_type))
    pixel = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    target = pruner.target(model, pixel)
    scores = pruner.scores(model, target.groups, data=[(pixel, torch.tensor([0]))], generator=torch.Generator())["0"]
    p1 = float(torch.tensor([7.0, -20.0], dtype=torch.float64).softmax(0)[1])
    assert scores.tolist() == pytest.approx([(7 * p1) ** 2, (20 * p1) ** 2])


def gate(model: nn.Module, layer: str, units: Any, gates: torch.Tensor) -> Any:
    """Multiply each output channel of a layer by its unit's gate, until the handle is removed."""
    width = len(model.get_parameter(f"{layer}.weight"))
    unit_of = {place: index for index, unit in enumerate(units) for place in unit.get(layer, ())}

    def multiply(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        one = torch.ones((), dtype=torch.float64)
        factors = [gates[unit_of[place]] if place in unit_of else one for place in range(width)]
        return output * torch.stack(factors).view(1, -1, 1, 1)

    return model.get_submodule(layer).register_forward_hook(multiply)


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("network", ["vgg", "vgg with biases", "resnet", "resnext"])
def test_it_is_the_squared_derivative_by_a_gate_on_all_filters_of_a_unit(network: str, scope: str) -> None:
    model = randomise(
        {
            "vgg": lambda: VGG((8, "M", 12, 8), hidden_features=16),
            "vgg with biases": lambda: VGG((8, "M", 12, 8), hidden_features=16, conv_bias=True),
            "resnet": lambda: ResNet(8),
            "resnext": lambda: ResNeXt(11, cardinality=4, base_width=4),
        }[network]()
    )
    data = images(6, 3)
    target, scores = found_scores(model, data, scope=scope)
    for group in target.groups:
        gates = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
        handles = [gate(model, layer, group.units, gates) for layer in group.layers]
        squares = []
        for pixels, labels in data:
            (slope,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels), gates)
            squares.append(slope.square())
        for handle in handles:
            handle.remove()
        assert torch.allclose(scores[group.name], torch.stack(squares).mean(0), rtol=1e-8, atol=1e-14), group.name


def test_the_lowest_scores_go_from_each_layer_or_from_all() -> None:
    model, data = randomise(VGG((8, "M", 12, 8), hidden_features=16)), images(20)
    target, scores = found_scores(model, data)
    each = prune(model, "taylor", example=torch.zeros(1, *SHAPE), data=data, ratio=0.5)
    assert [layer.kept for layer in each.report.layers] == [4, 6, 4]
    best = scores["features.0"].sort(descending=True).indices[:4].sort().values
    assert torch.equal(each.model.get_parameter("features.0.weight"), model.get_parameter("features.0.weight")[best])
    together = prune(model, "taylor", example=torch.zeros(1, *SHAPE), data=data, ratio=0.5, ranking="global")
    threshold = torch.cat([*scores.values()]).sort().values[14]
    expected = [int((scores[group.name] > threshold).sum()) for group in target.groups]
    assert [layer.kept for layer in together.report.layers] == [max(1, count) for count in expected]
