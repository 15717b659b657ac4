"""Magnitude pruning: one threshold for all convolution weights, and what the weights that remain cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rethink_prune import build_model, count_cost, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.lamp import lamp_scores
from rethink_prune.pruning.pruner import PruneResult
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

SIZE = 16
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)


def built(name: str) -> nn.Module:
    """Build a network with weights of the same spread in every layer."""
    model = build_model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def small_vgg() -> nn.Module:
    torch.manual_seed(0)
    return VGG([8, "M", 16, 16, "M", 24], hidden_features=32)


def toy(first: list[float], second: list[float]) -> nn.Sequential:
    """Two convolutions of these weights: 2 and 4 filters of 1 x 1 and 2 inputs each."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, len(second) // 2, 1), nn.Flatten())
    with torch.no_grad():
        for name, values in (("0.weight", first), ("2.weight", second)):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.tensor(values).view(parameter.shape))
    return model


def thin(model: nn.Module, example: torch.Tensor = EXAMPLE, **options: Any) -> PruneResult:
    return prune(model, "magnitude", example=example, **options)


TOY_EXAMPLE = torch.zeros(1, 2, 3, 3)


def weights_of(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> dict[str, torch.Tensor]:
    return {f"{n}.weight": m.get_parameter("weight").detach() for n, m in model.named_modules() if isinstance(m, kinds)}


def published_masks(weights: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
    """Keep what is strictly above the value at index ``int(n * ratio)`` of all in ascending order."""
    ordered, _ = torch.sort(torch.cat([weight.abs().flatten() for weight in weights.values()]))
    threshold = ordered[int(len(ordered) * ratio)]
    return {name: weight.abs().gt(threshold) for name, weight in weights.items()}


def assert_masks(result: PruneResult, model: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare masks, and the pruned network's parameters: those of `model`, zero where masked."""
    masks = result.architecture.masks
    # Layers that lose nothing have a mask too: scratch arms draw every convolution by one rule.
    assert set(expected) <= set(masks)
    assert all(mask.all() for name, mask in masks.items() if name not in expected)
    for name, parameter in model.named_parameters():
        pruned = result.model.get_parameter(name)
        if name in expected:
            assert torch.equal(masks[name], expected[name]), name
            assert torch.equal(pruned, parameter * expected[name]), name
        else:
            assert torch.equal(pruned, parameter), name


# ---- which weights go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.8])
@pytest.mark.parametrize("name", ["resnet20", "preresnet20"])
def test_one_threshold_over_all_convolutions_as_published(name: str, ratio: float) -> None:
    model = built(name)
    weights = weights_of(model)
    assert {"resnet20": "conv1.weight", "preresnet20": "layer1.0.projection.weight"}[name] in weights
    result = thin(model, ratio=ratio)
    assert_masks(result, model, published_masks(weights, ratio))
    total = sum(weight.numel() for weight in weights.values())
    assert sum(layer.full for layer in result.report.layers) == total
    kept = sum(layer.kept for layer in result.report.layers)
    assert 0 <= total - kept - (int(total * ratio) + 1) <= 3, "float32 draws hold a few equal magnitudes"
    assert result.architecture.modules == {}


def test_the_network_itself_is_untouched() -> None:
    model = built("resnet20").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = thin(model, ratio=0.5)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}


def test_threshold_on_a_hand_count() -> None:
    model = toy([0.1, -0.2, 0.3, -0.4], [0.05, -0.5, 0.25, 0.6])
    # Ascending: .05 .1 .2 .25 .3 .4 .5 .6. Index int(8 * .4) = 3, so that .25 goes as well: 4 of 8.
    result = thin(model, TOY_EXAMPLE, ratio=0.4)
    assert result.model.get_parameter("0.weight").flatten().tolist() == pytest.approx([0, 0, 0.3, -0.4])
    assert result.model.get_parameter("2.weight").flatten().tolist() == pytest.approx([0, -0.5, 0, 0.6])
    assert [(layer.layer, layer.kept, layer.full) for layer in result.report.layers] == [("0", 2, 4), ("2", 2, 4)]


def test_linear_layers_take_part_only_if_asked() -> None:
    model = small_vgg()
    assert not any(name.startswith("classifier") for name in thin(model, ratio=0.5).architecture.masks)
    result = thin(model, ratio=0.5, linear=True)
    expected = published_masks(weights_of(model, (nn.Conv2d, nn.Linear)), 0.5)
    assert {"classifier.0.weight", "classifier.3.weight"} <= set(expected)
    assert_masks(result, model, expected)


def test_uniform_distribution_removes_the_same_share_of_each() -> None:
    model = built("resnet20")
    result = thin(model, distribution="uniform", ratio=0.9)
    for layer in result.report.layers:
        assert layer.kept == int(layer.full * (1 - 0.9) + 1e-9)
        magnitudes = model.get_parameter(f"{layer.layer}.weight").detach().abs().flatten()
        mask = result.architecture.masks[f"{layer.layer}.weight"].flatten()
        assert magnitudes[mask].min() >= magnitudes[~mask].max()


def test_lamp_ranks_squares_by_their_share_of_what_is_not_smaller() -> None:
    # By hand: squares 1 4 9 of 14, 13, 9 in one layer; 16 64 144 256 of 480, 464, 400, 256 in the other.
    model = toy([1.0, -2.0, 3.0, 0.0], [4.0, 8.0, -12.0, 16.0])
    result = thin(model, TOY_EXAMPLE, distribution="lamp", ratio=0.5)
    # Ascending: 0, 1/14, 16/480, 64/464, 4/13, 144/400, 1, 1. Index 4 is 4/13, so three remain.
    assert result.model.get_parameter("0.weight").flatten().tolist() == [0, 0, 3, 0]
    assert result.model.get_parameter("2.weight").flatten().tolist() == [0, 0, -12, 16]


def test_lamp_agrees_with_its_definition_and_does_not_depend_on_a_layers_scale() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    squares = values.square()
    expected = [float(square / squares[squares >= square].sum()) for square in squares]
    assert lamp_scores(values).tolist() == pytest.approx(expected)
    model, scaled = built("resnet20"), built("resnet20")
    with torch.no_grad():
        scaled.get_parameter("layer1.0.conv1.weight").mul_(64)
    masks = [thin(network, distribution="lamp", ratio=0.8).architecture.masks for network in (model, scaled)]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert thin(model, ratio=0.8).architecture.masks["layer1.0.conv1.weight"].sum() < 2304 / 2
    scaled_mask = thin(scaled, ratio=0.8).architecture.masks["layer1.0.conv1.weight"]
    assert scaled_mask.double().mean() > 0.97, "by magnitude, the scale decides"


def test_erk_keeps_weights_in_proportion_to_the_sum_of_dimensions() -> None:
    model = built("resnet20")
    result = thin(model, distribution="erk", ratio=0.9)
    assert result.report.warnings == ()
    dimensions = {name: sum(parameter.shape) for name, parameter in weights_of(model).items()}
    shares = {f"{layer.layer}.weight": layer.kept / layer.full for layer in result.report.layers}
    whole = {name for name, share in shares.items() if share == 1}
    # 16 x 3 x 3 x 3 has 25 per 432 weights, 64 x 64 x 3 x 3 has 134 per 36,864.
    assert "conv1.weight" in whole
    assert "layer3.0.conv2.weight" not in whole
    scale = [
        layer.kept / dimensions[n] for n, layer in zip(shares, result.report.layers, strict=True) if n not in whole
    ]
    assert max(scale) - min(scale) < 1 / 25, "kept weights per sum of dimensions, but for rounding down"
    total = sum(layer.full for layer in result.report.layers)
    assert 0 <= total * 0.1 - sum(layer.kept for layer in result.report.layers) < len(shares)
    for layer in result.report.layers:
        magnitudes = model.get_parameter(f"{layer.layer}.weight").detach().abs().flatten()
        mask = result.architecture.masks[f"{layer.layer}.weight"].flatten()
        assert mask.sum() == layer.kept
        assert layer.kept == layer.full or magnitudes[mask].min() >= magnitudes[~mask].max()


def test_erk_leaves_out_what_is_skipped() -> None:
    model = built("resnet20")
    result = thin(model, distribution="erk", ratio=0.5, skip=["layer3.*"])
    kept = {layer.layer: (layer.kept, layer.full) for layer in result.report.layers}
    assert all(kept[name][0] == kept[name][1] for name in kept if name.startswith("layer3"))
    others = [counts for name, counts in kept.items() if not name.startswith("layer3")]
    assert sum(count for count, _ in others) == pytest.approx(0.5 * sum(size for _, size in others), rel=1e-3)


@pytest.mark.parametrize("distribution", ["global", "lamp"])
def test_thin_layers_are_named_and_a_minimum_share_protects_them(distribution: str) -> None:
    model = built("resnet20")
    with torch.no_grad():
        # One large weight: neither its magnitude nor its share leaves room for the others.
        weight = model.get_parameter("layer2.0.conv1.weight").mul_(1e-4)
        weight.view(-1)[7] = 100.0
    result = thin(model, distribution=distribution, ratio=0.5)
    assert [text for text in result.report.warnings if text.startswith("less than 10 % of layer2.0.conv1: 1 of 4608")]
    safe = thin(model, distribution=distribution, ratio=0.5, min_share=0.1)
    assert next(layer.kept for layer in safe.report.layers if layer.layer == "layer2.0.conv1") == 461
    assert safe.report.warnings == ()
    others = {"layer2.0.conv1.weight"}
    for name, mask in result.architecture.masks.items():
        assert name in others or torch.equal(mask, safe.architecture.masks[name])


def test_keys_of_earlier_versions_hold() -> None:
    def key(**options: Any) -> dict[str, Any]:
        return parse_pruner({"name": "magnitude", "ratio": 0.5, **options}, find_pruner("magnitude").options_type).key()

    common = {
        "name": "magnitude",
        "linear": False,
        "ratio": 0.5,
        "target_macs": None,
        "target_params": None,
        "skip": [],
    }
    assert key() == {**common, "ranking": "global"}
    assert key(distribution="uniform") == {**common, "ranking": "layer"}
    assert key(distribution="lamp", min_share=0.1) == {**common, "ranking": "lamp", "min_share": 0.1}


def test_ratios_by_position_and_by_pattern() -> None:
    model = toy([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])

    def kept(ratio: object) -> list[int]:
        return [x.kept for x in thin(model, TOY_EXAMPLE, distribution="uniform", ratio=ratio).report.layers]

    assert kept([0.5, 0.25]) == [2, 6]
    assert kept({"2": 0.5}) == [4, 4]
    masks = thin(model, TOY_EXAMPLE, distribution="uniform", ratio={"2": 0.5}).architecture.masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 4, "2.weight": 4}
    with pytest.raises(UserError, match=r"pruner\.ratio: one for each layer needs pruner\.distribution=uniform"):
        thin(model, TOY_EXAMPLE, ratio=[0.5, 0.25])
    with pytest.raises(UserError, match=r"pruner\.ratio: 3 entries for 2 prunable layers"):
        thin(model, TOY_EXAMPLE, distribution="uniform", ratio=[0.5, 0.25, 0.5])


def test_skipped_layers_stay_whole_and_do_not_count() -> None:
    model = built("resnet20")
    result = thin(model, ratio=0.5, skip=["conv1", "layer3.*"])
    weights = {n: w for n, w in weights_of(model).items() if n != "conv1.weight" and not n.startswith("layer3")}
    assert_masks(result, model, published_masks(weights, 0.5))


def test_layer_that_the_threshold_would_empty_keeps_its_largest_weight_and_is_named() -> None:
    result = thin(toy([0.1, -0.3, 0.2, 0.1], [1.0, 2.0, -3.0, 4.0]), TOY_EXAMPLE, ratio=0.5)
    assert result.model.get_parameter("0.weight").flatten().tolist() == pytest.approx([0, -0.3, 0, 0])
    assert result.model.get_parameter("2.weight").flatten().tolist() == [0, 2, -3, 4], "index 4 of 8 is the 1.0"
    assert result.report.warnings == ("0: the threshold would have emptied it; its best weight stays",)


def test_equal_magnitudes_go_together_and_the_lower_index_stays_where_one_must() -> None:
    result = thin(toy([-1.0, 1.0, 1.0, 1.0], [1.0, 2.0, -1.0, 4.0]), TOY_EXAMPLE, ratio=0.2)
    assert result.model.get_parameter("0.weight").flatten().tolist() == [-1, 0, 0, 0]
    assert result.model.get_parameter("2.weight").flatten().tolist() == [0, 2, 0, 4]
    assert result.report.warnings == ("0: the threshold would have emptied it; its best weight stays",)


def test_weights_that_are_zero_all_go_even_if_they_are_more_than_the_share() -> None:
    result = thin(toy([0.0, 0.0, 3.0, 4.0], [0.0, 2.0, 0.0, 4.0]), TOY_EXAMPLE, ratio=0.1)
    assert [layer.kept for layer in result.report.layers] == [2, 2]


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"2.* not finite$"):
        thin(toy([1.0] * 4, [1.0, value, 1.0, 1.0]), TOY_EXAMPLE, ratio=0.5)


def test_network_without_convolutions_is_refused_unless_linear_layers_take_part() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4, bias=False))
    example = torch.zeros(1, 2, 2, 2)
    with pytest.raises(UserError, match=r"finds no convolutions in Sequential; pruner\.linear=true prunes linear"):
        thin(model, example, ratio=0.5)
    assert [layer.kept for layer in thin(model, example, ratio=0.5, linear=True).report.layers] == [15]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "skip": ["0", "[13]", "2"]}, r"pruner\.skip: \[13\] matches no prunable layer"),
        (
            {"ratio": 0.5, "skip": ["*"]},
            r"pruner\.ratio: removes no weight \(with pruner\.skip and min_share as they are\)",
        ),
        ({"target_macs": 0.5, "skip": ["*"]}, r"pruner\.target_macs: removes no weight"),
        ({"ratio": 1.0}, r"pruner\.ratio=1: must be in \(0, 1\)"),
        ({"ratio": 0.5, "target_macs": 0.5}, "give exactly one"),
    ],
)
def test_options_that_cannot_be_are_refused_before_there_is_a_trained_network(
    options: dict[str, Any], message: str
) -> None:
    found = find_pruner("magnitude")
    with pytest.raises(UserError, match=message):
        prune(toy([1.0] * 4, [1.0] * 4), "magnitude", example=TOY_EXAMPLE, **options)
    if "skip" in options:
        pruner = found(found.options_type.model_validate({"name": "magnitude", **options}))
        with pytest.raises(UserError, match=message):
            pruner.target(toy([1.0] * 4, [1.0] * 4), TOY_EXAMPLE)


def test_a_share_that_only_the_last_weight_of_a_layer_fills_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(0.01)
        model.get_parameter("1.weight").fill_(1.0)
    with pytest.raises(UserError, match=r"pruner\.ratio: removes no weight"):
        thin(model, torch.zeros(1, 1, 4, 4), ratio=0.05)


def test_layers_without_sizes_yet_are_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential: cannot be copied: .*uninitialized"):
        count_cost(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(5, 3)), (3, SIZE, SIZE))


def test_computed_weights_are_left_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 5, 3))
    assert [layer.layer for layer in thin(model, ratio=0.5).report.layers] == ["1"]


# ---- what it costs ---------------------------------------------------------------------------------------


def hand_count(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """Count non-zero weights of convolutions and linear layers at each place where they are used, and parameters."""
    macs = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        pixels = output[0, 0].numel() if output.ndim == 4 else 1
        macs += int(module.get_parameter("weight").count_nonzero()) * pixels

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(example)
    for handle in handles:
        handle.remove()
    zeros = sum(int((weight == 0).sum()) for weight in weights_of(model, (nn.Conv2d, nn.Linear)).values())
    return macs, sum(p.numel() for p in model.parameters()) - zeros


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 3, dilation=2, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: built("preresnet20"), {"ratio": 0.8}),
        (small_vgg, {"ratio": 0.6, "linear": True}),
        (grouped, {"ratio": 0.5, "linear": True}),
    ],
    ids=["preresnet20", "vgg", "grouped"],
)
def test_cost_counts_the_weights_that_remain_where_they_are_used(
    build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    result = thin(build(), **options)
    cost = count_cost(result.model, (3, SIZE, SIZE), masks=result.architecture.masks)
    assert (cost.macs, cost.params) == hand_count(result.model, EXAMPLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cost_does_not_depend_on_the_number_format(dtype: torch.dtype) -> None:
    single, other = (thin(model, distribution="uniform", ratio=0.5) for model in (grouped(), grouped().to(dtype)))
    costs = [count_cost(x.model, (3, SIZE, SIZE), masks=x.architecture.masks) for x in (single, other)]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("distribution", ["global", "uniform", "erk", "lamp"])
@pytest.mark.parametrize(("target", "value"), [("macs", 0.3), ("macs", 4e6), ("params", 0.1), ("params", 150_000)])
def test_cost_target_is_met_within_one_percent(distribution: str, target: str, value: float) -> None:
    model = built("resnet20")
    options: dict[str, Any] = {f"target_{target}": value}
    result = thin(model, distribution=distribution, **options)
    reached = getattr(count_cost(result.model, (3, SIZE, SIZE), masks=result.architecture.masks), target)
    full = getattr(count_cost(model, (3, SIZE, SIZE)), target)
    wanted = value * full if value < 1 else value
    assert abs(reached - wanted) <= 0.01 * wanted


def test_cost_target_out_of_reach_is_refused_before_there_is_a_trained_network() -> None:
    found = find_pruner("magnitude")
    pruner = found(parse_pruner({"name": "magnitude", "target_params": 0.0001}, found.options_type))
    message = r"pruner\.target_params=0\.0001: out of reach; the least that can remain is \d+ of 269722; values below 1"
    with pytest.raises(UserError, match=message):
        pruner.target(built("resnet20"), torch.zeros(1, 3, SIZE, SIZE))


# ---- shared and grouped weights --------------------------------------------------------------------------


class Shared(nn.Module):
    """Three calls of one weight: by one module twice, and by another that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.twice.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.twice(self.twice(self.first(x))).relu()).flatten(1)


def test_shared_weight_is_ranked_once_and_costs_where_it_is_used() -> None:
    torch.manual_seed(0)
    model = Shared()
    result = thin(model, ratio=0.5)
    assert [layer.layer for layer in result.report.layers] == ["first", "twice"]
    first, twice = (int(result.architecture.masks[f"{name}.weight"].sum()) for name in ("first", "twice"))
    assert first + twice == (108 + 144) // 2 - 1
    assert result.model.get_parameter("tied.weight") is result.model.get_parameter("twice.weight")
    cost = count_cost(result.model, (3, SIZE, SIZE), masks=result.architecture.masks)
    assert cost.macs == (first + 3 * twice) * SIZE * SIZE
    assert cost.params == first + twice + 3 * 4
    targeted = thin(model, target_macs=0.5)
    macs = count_cost(targeted.model, (3, SIZE, SIZE), masks=targeted.architecture.masks).macs
    assert macs == pytest.approx(0.5 * (108 + 3 * 144) * SIZE * SIZE, rel=0.01)
    assert targeted.model(EXAMPLE).shape == (1, 4 * SIZE * SIZE)


def test_masks_rebuild_the_network_from_data(tmp_path: Path) -> None:
    result = thin(Shared(), ratio=0.5)
    result.architecture.save(tmp_path)
    loaded = Architecture.load(tmp_path)
    assert all(torch.equal(mask, loaded.masks[name]) for name, mask in result.architecture.masks.items())
    rebuilt = reshape(Shared(), loaded)
    rebuilt.load_state_dict(result.model.state_dict())
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rebuilt(images), result.model(images))


def test_convolutions_of_other_dimensions_take_part() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 4, 3, padding=1), nn.Flatten())
    result = thin(model, torch.zeros(1, 2, 8), ratio=0.5)
    kept = sum(layer.kept for layer in result.report.layers)
    assert kept == 54 - 28
    assert count_cost(result.model, (2, 8), masks=result.architecture.masks).macs == 8 * kept


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_a_ratio_that_a_minimum_share_keeps_from_is_said(distribution: str) -> None:
    result = thin(built("resnet20"), distribution=distribution, ratio=0.9, min_share=0.5)
    assert "pruner.ratio=0.9: only 50 % go, because of min_share, min_channels or round_to" in result.report.warnings


# ---- a network that was pruned before --------------------------------------------------------------------


def pruner_of(name: str, **options: Any) -> Any:
    found = find_pruner(name)
    return found(parse_pruner({"name": name, **options}, found.options_type))


def once_more(model: nn.Module, masks: Mapping[str, torch.Tensor], name: str = "magnitude", **options: Any) -> Any:
    """Prune a network of which only some weights remain."""
    pruner = pruner_of(name, **options)
    target = pruner.target(model, EXAMPLE, masks=masks)
    return pruner.prune(model, target, data=None, generator=torch.Generator())


def test_the_second_round_ranks_the_weights_that_remain_as_published() -> None:
    model = built("resnet20")
    first = thin(model, ratio=0.3)
    # What training does in between: all weights move, also those that a mask holds at zero.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    second = once_more(model, first.architecture.masks, ratio=0.3)

    weights = {n: w * first.architecture.masks[n] for n, w in weights_of(model).items()}
    total = sum(weight.numel() for weight in weights.values())
    nonzero = sum(int(weight.count_nonzero()) for weight in weights.values())
    ordered = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
    threshold = ordered[total - nonzero + int(nonzero * 0.3)]
    assert_masks(second, model, {name: weight.abs().gt(threshold) for name, weight in weights.items()})
    assert [layer.full for layer in second.report.layers] == [layer.kept for layer in first.report.layers]


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.5, "distribution": "uniform"}])
def test_two_rounds_of_the_same_weights_are_nested_best_weights(options: dict[str, Any]) -> None:
    model = built("resnet20")
    first = thin(model, **options)
    second = once_more(first.model, first.architecture.masks, **options)
    weights = weights_of(model)
    if "distribution" in options:
        expected = {}
        for name, weight in weights.items():
            kept = int(int(weight.numel() * 0.5) * 0.5)
            best = weight.abs().flatten().sort(descending=True, stable=True).indices[:kept]
            expected[name] = torch.zeros(weight.numel(), dtype=torch.bool)
            expected[name][best] = True
            expected[name] = expected[name].view(weight.shape)
    else:
        ordered = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
        remaining = int((ordered > ordered[int(len(ordered) * 0.5)]).sum())
        threshold = ordered[len(ordered) - remaining + int(remaining * 0.5)]
        expected = {name: weight.abs() > threshold for name, weight in weights.items()}
    assert_masks(second, model, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("magnitude", {"distribution": chosen}) for chosen in ("global", "uniform", "erk", "lamp")),
        ("lamp", {}),
    ],
)
@pytest.mark.parametrize("goal", [{"ratio": 0.5}, {"target_params": 0.3}, {"target_macs": 0.3}])
def test_no_weight_comes_back(name: str, options: dict[str, Any], goal: dict[str, float]) -> None:
    model = built("resnet20")
    before = thin(model, ratio=0.5, linear=True).architecture.masks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    result = once_more(model, before, name, **options, **goal)
    masks = result.architecture.masks
    assert masks.keys() == before.keys()
    assert all((masks[n] <= before[n]).all() for n in masks)
    assert torch.equal(masks["fc.weight"], before["fc.weight"]), "linear layers take no part now"
    assert all((result.model.get_parameter(n)[~mask] == 0).all() for n, mask in masks.items())
    cost, full = count_cost(result.model, (3, SIZE, SIZE), masks=masks), count_cost(model, (3, SIZE, SIZE))
    if "ratio" in goal:
        remaining = sum(int(mask.sum()) for n, mask in before.items() if n != "fc.weight")
        kept = sum(int(mask.sum()) for n, mask in masks.items() if n != "fc.weight")
        assert kept == pytest.approx(0.5 * remaining, abs=25), "the ratio is of what remains"
    else:
        ((option, share),) = goal.items()
        quantity = option.removeprefix("target_")
        assert getattr(cost, quantity) == pytest.approx(share * getattr(full, quantity), rel=0.01), "of the whole"


def test_erk_takes_the_density_of_all_weights_and_no_more_than_remains() -> None:
    # By hand: sums of dimensions 2 + 2 + 1 + 1 = 6 and 4 + 2 + 1 + 1 = 8, sizes 4 and 8; 3 and 8 of these remain.
    model = toy([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    before = {"0.weight": torch.tensor([True, False, True, True]).view(2, 2, 1, 1)}
    pruner = pruner_of("magnitude", distribution="erk", ratio=0.3)
    target = pruner.target(model, TOY_EXAMPLE, masks=before)
    result = pruner.prune(model, target, data=None, generator=torch.Generator())
    # 0.7 * 11 / 12 of 12 weights are 7.7: 6 / 14 of these are 3.3, more than 3, so that 4.7 are left for the other.
    assert [(layer.kept, layer.full) for layer in result.report.layers] == [(3, 3), (4, 8)]
    assert result.model.get_parameter("0.weight").flatten().tolist() == [1, 0, 3, 4]
    assert result.model.get_parameter("2.weight").flatten().tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_a_mask_of_another_network_is_refused() -> None:
    for masks in ({"9.weight": torch.ones(1)}, {"0.weight": torch.ones(3)}):
        with pytest.raises(UserError, match=r"pruner\.name=magnitude: the mask of \d\.weight fits no parameter of"):
            pruner_of("magnitude", ratio=0.5).target(toy([1.0] * 4, [1.0] * 4), TOY_EXAMPLE, masks=masks)


def test_lamp_is_magnitude_with_that_distribution() -> None:
    model = built("resnet20")
    first, second = thin(model, distribution="lamp", ratio=0.8), prune(model, "lamp", example=EXAMPLE, ratio=0.8)
    assert first.report == second.report
    assert all(torch.equal(mask, second.architecture.masks[name]) for name, mask in first.architecture.masks.items())
    with pytest.raises(UserError, match=r"pruner\.ratio=\{layer1\.\*: 0\.5\}: must be a valid number"):
        prune(model, "lamp", example=EXAMPLE, ratio={"layer1.*": 0.5})
