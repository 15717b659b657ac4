"""Soft filter pruning: what is zeroed after each epoch, and what is removed or masked in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import Net
from rethink_prune import build_model, count_cost, prune
from rethink_prune.config import ChannelOptions
from rethink_prune.errors import UserError
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.pruner import PruneResult
from rethink_prune.pruning.soft_filter import SoftFilter
from rethink_prune.study.budget import scratch_b_epochs
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

SIZE = 16
SHAPE = (3, SIZE, SIZE)
EXAMPLE = torch.zeros(1, *SHAPE)
# Of resnet20: the first convolution of each block is prunable alone, the others write to the residual stream.
INNER = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
STREAM = ["conv1", *(name.replace("conv1", "conv2") for name in INNER)]


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def built(name: str = "resnet20") -> nn.Module:
    """Build a network with batch norms that no channel shares; float64, evaluation mode."""
    torch.manual_seed(0)
    model = build_model(name).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
    return model


def soft(model: nn.Module, **options: Any) -> PruneResult:
    return prune(model, "soft_filter", example=EXAMPLE, **options)


def targeted(model: nn.Module, **options: Any) -> tuple[SoftFilter, ChannelTarget]:
    found = find_pruner("soft_filter")
    pruner = found(found.options_type.model_validate({"name": "soft_filter", **options}))
    assert isinstance(pruner, SoftFilter)
    return pruner, pruner.target(model, EXAMPLE)


def zero(pruner: Any, target: ChannelTarget, model: nn.Module) -> None:
    """Do what an epoch's end does, in a training of one epoch."""
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    assert "regrown" not in hooks.after_epoch(model), "nothing was zero before"
    hooks.finish(model)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def norm_after(layer: str) -> str:
    return layer.replace("conv", "bn")


def zero_filters(model: nn.Module) -> dict[str, list[int]]:
    return {
        name: (~module.weight.flatten(1).any(1)).nonzero().flatten().tolist()
        for name, module in convolutions(model).items()
    }


def smallest_filters(model: nn.Module, ratio: float, layers: Iterable[str]) -> dict[str, list[int]]:
    """Return the ``int(N * ratio)`` filters of smallest L2 norm of each layer."""
    chosen = {}
    for name in layers:
        weight = model.get_parameter(f"{name}.weight").detach()
        norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3))
        chosen[name] = norms.argsort()[: int(len(weight) * ratio)].sort().values.tolist()
    return chosen


def without(model: nn.Module, gone: Mapping[str, list[int]], images: torch.Tensor) -> torch.Tensor:
    """Run the full network with gamma and beta of these channels set to zero; the network is changed."""
    with torch.no_grad():
        for layer, filters in gone.items():
            for kind in ("weight", "bias"):
                model.get_parameter(f"{norm_after(layer)}.{kind}")[filters] = 0.0
        return model(images)


def images() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- how many --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, (15, 29, 58)), (0.2, (13, 26, 52)), (0.3, (12, 23, 45))])
def test_published_widths(ratio: float, kept: tuple[int, int, int]) -> None:
    model = build_model("resnet20")
    _, target = targeted(model, ratio=ratio, scope="all")
    widths = dict(zip((16, 32, 64), kept, strict=True))
    assert target.widths == {name: widths[layer.out_channels] for name, layer in convolutions(model).items()}
    assert [layer.layer for layer in target.report().layers] == list(convolutions(model)), "in network order"


def test_at_least_one_filter_remains() -> None:
    assert targeted(VGG([3, 4], head="linear"), ratio=0.99)[1].widths == {"features.0": 1, "features.3": 1}


def test_filters_ranked_together_go_by_one_threshold() -> None:
    model = built()
    pruner, target = targeted(model, ratio=0.4, ranking="global", scope="all")
    assert not target.known, "how many go of each layer follows from the weights"
    norms = {name: layer.weight.detach().flatten(1).norm(dim=1) for name, layer in convolutions(model).items()}
    norms = {name: values / values.mean() for name, values in norms.items()}  # whatever the fan-in
    ordered = torch.cat(list(norms.values())).sort().values
    threshold = ordered[int(len(ordered) * 0.4)]
    expected = {name: (values <= threshold).nonzero().flatten().tolist() for name, values in norms.items()}
    for name, values in norms.items():
        if len(expected[name]) == len(values):
            expected[name].remove(int(values.argmax()))
    result = soft(model, ratio=0.4, ranking="global", scope="all")
    zero(pruner, target, model)
    assert zero_filters(model) == expected
    assert {x.layer: x.full - x.kept for x in result.report.layers} == {n: len(gone) for n, gone in expected.items()}


def test_options_that_leave_all_filters_are_refused() -> None:
    with pytest.raises(UserError, match=r"pruner\.ratio=0\.01: removes nothing"):
        soft(build_model("resnet20"), ratio=0.01)


# ---- zeroing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_smallest_filters_of_each_layer_are_zeroed_and_nothing_else(scope: str) -> None:
    model = built()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = convolutions(model) if scope == "all" else INNER
    expected: dict[str, list[int]] = {name: [] for name in convolutions(model)} | smallest_filters(model, 0.3, layers)
    pruner, target = targeted(model, ratio=0.3, scope=scope)
    zero(pruner, target, model)
    assert zero_filters(model) == expected
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") in expected:
            before[name][expected[name.removesuffix(".weight")]] = 0.0
        assert torch.equal(tensor, before[name]), name


def test_the_norm_is_the_second_and_a_bias_goes_with_its_filter() -> None:
    net = Net(lambda m, x: m.out(F.relu(m.a(x))), a=conv(1, 3), out=conv(3, 2))
    with torch.no_grad():
        net.get_parameter("a.weight").zero_()
        net.get_parameter("a.weight").view(3, 9)[0, :4] = 1.0  # L1 4, L2 2
        net.get_parameter("a.weight").view(3, 9)[1, 0] = -3.0  # L1 3, L2 3
        net.get_parameter("a.weight").view(3, 9)[2] = 1.0  # L1 9, L2 3
        net.get_parameter("a.bias").fill_(7.0)
    found = find_pruner("soft_filter")
    pruner = found(found.options_type.model_validate({"name": "soft_filter", "ratio": 0.4}))
    target = pruner.target(net, torch.zeros(1, 1, 4, 4))
    zero(pruner, target, net)
    assert zero_filters(net)["a"] == [0]
    assert net.get_parameter("a.bias").tolist() == [0, 7, 7]


def test_filters_grow_again_until_the_epoch_ends() -> None:
    """From the real initialisation: zeroed before the first step, when shifts are zero, they never would."""
    torch.manual_seed(0)
    model = build_model("resnet20").train()
    pruner, target = targeted(model, ratio=0.3, scope="all")
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    assert not any(zero_filters(model).values()), "nothing is zeroed before the first epoch"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    data = images().float().repeat(8, 1, 1, 1) + torch.randn(16, *SHAPE)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(data), torch.arange(16) % 10).backward()
            optimizer.step()

    train(5)
    assert hooks.after_epoch(model) == {}
    first = zero_filters(model)
    assert sum(map(len, first.values())) > 150
    train(5)
    zero_still = zero_filters(model)
    zeroed = sum(map(len, first.values()))
    grown = zeroed - sum(len(set(first[name]) & set(zero_still[name])) for name in first)
    assert grown > zeroed / 4
    expected = smallest_filters(model, 0.3, first)
    assert hooks.after_epoch(model)["regrown"] == pytest.approx(100 * grown / zeroed)
    second = zero_filters(model)
    assert second == {name: sorted({*filters}) for name, filters in expected.items()}
    assert first != second
    assert {name: len(filters) for name, filters in first.items()} == {n: len(f) for n, f in second.items()}
    before = {*model.state_dict()}
    hooks.finish(model)
    assert {*model.state_dict()} == before
    assert not [name for name, _ in model.named_buffers() if "zeroed" in name]


def test_what_decides_the_training_is_part_of_its_key() -> None:
    def key(**options: Any) -> Mapping[str, Any]:
        pruner, target = targeted(VGG([8, 12], head="linear"), **options)
        return pruner.sparse(target).key

    assert key(ratio=0.25) == key(ratio=0.25)
    for options in ({"ratio": 0.5}, {"ratio": 0.25, "skip": ["features.0"]}, {"ratio": 0.25, "ranking": "global"}):
        assert key(**options) != key(ratio=0.25)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_network_that_has_diverged_is_left_for_its_loss_to_tell(value: float) -> None:
    model = built()
    pruner, target = targeted(model, ratio=0.3)
    with torch.no_grad():
        model.get_parameter("layer1.0.conv1.weight")[0] = value
    zero(pruner, target, model)
    assert not any(zero_filters(model).values())


def test_group_of_a_grouped_convolution_is_zeroed_with_what_it_reads() -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.b(F.relu(m.a(x))))),
        a=conv(3, 6, bias=False),
        b=conv(6, 6, groups=3, bias=False),
        out=conv(6, 2),
    )
    with torch.no_grad():
        net.get_parameter("a.weight")[2:4] = 1e-3
        net.get_parameter("b.weight")[2:4] = 1e-3
    pruner, target = targeted(net, ratio=0.34, scope="all")
    zero(pruner, target, net)
    assert zero_filters(net) == {"a": [2, 3], "b": [2, 3], "out": []}
    result = soft(net, ratio=0.34, scope="all")
    assert result.architecture.masks == {}
    assert result.model.get_parameter("b.weight").shape == (4, 2, 3, 3)
    assert (result.model(images().float()) - net(images().float())).abs().max() < 1e-5


# ---- removal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_what_the_last_epoch_zeroed_is_what_goes(scope: str) -> None:
    model = built()
    pruner, target = targeted(model, ratio=0.3, scope=scope)
    zero(pruner, target, model)
    zeroed = zero_filters(model)
    result = soft(model, ratio=0.3, scope=scope)
    assert {layer.layer: layer.full - layer.kept for layer in result.report.layers} == {
        name: len(filters) for name, filters in zeroed.items() if filters
    }
    for layer in convolutions(model):
        scales = model.get_parameter(f"{norm_after(layer)}.weight")
        kept = torch.isin(scales, result.model.get_parameter(f"{norm_after(layer)}.weight"))
        assert (~kept).nonzero().flatten().tolist() == zeroed[layer]


def test_inner_removal_equals_gamma_and_beta_zero() -> None:
    model = built()
    gone = smallest_filters(model, 0.5, INNER)
    result = soft(model, ratio=0.5)
    assert result.architecture.masks == {}
    with torch.no_grad():
        before, after = model(images()), result.model(images())
    expected = without(model, gone, images())
    assert (after - expected).abs().max() < 1e-10
    assert (before - expected).abs().max() > 1e-3


def test_scope_all_removes_inner_channels_and_masks_the_rest() -> None:
    model = built()
    gone = smallest_filters(model, 0.3, convolutions(model))
    result = soft(model, ratio=0.3, scope="all")
    for layer in INNER:
        pruned = result.model.get_submodule(layer)
        assert isinstance(pruned, nn.Conv2d)
        assert pruned.out_channels == model.get_parameter(f"{layer}.weight").shape[0] - len(gone[layer])
    parameters = [f"{layer}.weight" for layer in STREAM]
    parameters += [f"{norm_after(layer)}.{kind}" for layer in STREAM for kind in ("weight", "bias")]
    assert set(result.architecture.masks) == set(parameters)
    for layer in STREAM:
        for name in (f"{layer}.weight", f"{norm_after(layer)}.weight", f"{norm_after(layer)}.bias"):
            mask, value = result.architecture.masks[name], result.model.get_parameter(name)
            assert mask.shape == value.shape
            rows = mask.flatten(1) if mask.ndim > 1 else mask[:, None]
            assert torch.equal(rows.any(1), rows.all(1)), "whole filters"
            assert (~rows.all(1)).nonzero().flatten().tolist() == gone[layer]
            assert not value[~mask].any()
            assert value[mask].any()
    with torch.no_grad():
        before, after = model(images()), result.model(images())
    expected = without(model, gone, images())
    assert (after - expected).abs().max() < 1e-10
    assert (before - expected).abs().max() > 1e-3


def test_masked_filters_cost_nothing() -> None:
    result = soft(built(), ratio=0.3, scope="all")
    sides = {"conv1": SIZE, "layer1": SIZE, "layer2": SIZE // 2, "layer3": SIZE // 4}
    macs = sum(
        int(layer.weight.count_nonzero()) * sides[name.partition(".")[0]] ** 2
        for name, layer in convolutions(result.model).items()
    )
    params = sum(p.numel() for p in result.model.parameters())
    params -= sum(int((~mask).sum()) for mask in result.architecture.masks.values())
    cost = count_cost(result.model, SHAPE, masks=result.architecture.masks)
    assert (cost.macs, cost.params) == (macs + 64 * 10, params)
    assert cost.macs < count_cost(result.model, SHAPE).macs


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_rebuilt_from_data_gives_the_same_bits(scope: str, tmp_path: Path) -> None:
    result = soft(built(), ratio=0.3, scope=scope)
    result.architecture.save(tmp_path)
    loaded = Architecture.load(tmp_path)
    assert set(loaded.masks) == set(result.architecture.masks)
    rebuilt = reshape(build_model("resnet20").double().eval(), loaded)
    rebuilt.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(images()), result.model(images()))


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_architecture_without_training_costs_what_the_trained_one_does(scope: str) -> None:
    model = built()
    _, target = targeted(model, ratio=0.3, scope=scope)
    assert target.known
    result = soft(model, ratio=0.3, scope=scope)
    assert target.cost == count_cost(result.model, SHAPE, masks=result.architecture.masks)
    assert target.report().layers == result.report.layers
    untrained = target.architecture()
    assert untrained.modules == result.architecture.modules
    assert {n: int(m.sum()) for n, m in untrained.masks.items()} == {
        n: int(m.sum()) for n, m in result.architecture.masks.items()
    }


@pytest.mark.parametrize("target", ["macs", "params"])
def test_cost_target_counts_masked_filters_as_gone(target: str) -> None:
    model = built()
    options: dict[str, Any] = {f"target_{target}": 0.5}
    result = soft(model, scope="all", **options)
    cost = count_cost(result.model, SHAPE, masks=result.architecture.masks)
    assert getattr(cost, target) == pytest.approx(0.5 * getattr(count_cost(model, SHAPE), target), rel=0.01)


# ---- odd networks ----------------------------------------------------------------------------------------


def residual(**norms: nn.Module) -> Net:
    return Net(
        lambda m, x: m.fc(F.relu((y := m.bn_a(m.a(x))) + m.bn_b(m.b(F.relu(y)))).mean((2, 3))),
        a=conv(3, 4),
        b=conv(4, 4),
        fc=nn.Linear(4, 5),
        **norms,
    )


def test_classes_of_a_network_that_ends_in_a_convolution_are_not_masked() -> None:
    net = Net(lambda m, x: m.out(F.relu(m.bn(m.a(x)))).mean((2, 3)), a=conv(3, 6), bn=nn.BatchNorm2d(6), out=conv(6, 9))
    result = soft(net, ratio=0.4, scope="all")
    assert [layer.layer for layer in result.report.layers] == ["a"]
    assert result.architecture.masks == {}


def test_weight_that_two_convolutions_share_is_masked_once() -> None:
    net = Net(
        lambda m, x: m.fc(F.relu((y := m.a(x)) + m.c(m.b(y))).mean((2, 3))),
        a=conv(3, 4, bias=False),
        b=conv(4, 4, bias=False),
        c=conv(4, 4, bias=False),
        fc=nn.Linear(4, 5),
    )
    net.get_submodule("c").weight = net.get_parameter("b.weight")
    masks = soft(net, ratio=0.5, scope="all").architecture.masks
    assert set(masks) == {"a.weight", "b.weight"}
    assert masks["b.weight"].flatten(1).all(1).sum() == 2
    rebuilt = reshape(net, Architecture(masks=masks))
    assert rebuilt.get_parameter("b.weight") is rebuilt.get_parameter("c.weight")


def test_convolution_with_a_computed_weight_is_left_whole() -> None:
    computed = nn.utils.parametrizations.weight_norm(conv(3, 4))
    net = Net(lambda m, x: m.out(F.relu(m.a(m.computed(x)))), computed=computed, a=conv(4, 4), out=conv(4, 5))
    assert [layer.layer for layer in soft(net, ratio=0.5, scope="all").report.layers] == ["a"]


def test_bias_of_a_masked_filter_is_masked() -> None:
    result = soft(residual(bn_a=nn.BatchNorm2d(4), bn_b=nn.BatchNorm2d(4)), ratio=0.5, scope="all")
    names = {f"{module}.{kind}" for module in ("a", "b", "bn_a", "bn_b") for kind in ("weight", "bias")}
    assert set(result.architecture.masks) == names


def test_batch_norm_of_two_convolutions_keeps_its_scales() -> None:
    shared = nn.BatchNorm2d(4)
    net = residual(bn_a=shared, bn_b=shared)
    with torch.no_grad():
        net.get_parameter("a.weight")[:2] = 0.0
        net.get_parameter("b.weight")[2:] = 0.0
    masks = soft(net, ratio=0.5, scope="all").architecture.masks
    assert set(masks) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert masks["a.bias"].tolist() == [False, False, True, True]
    assert masks["b.bias"].tolist() == [True, True, False, False]


def test_channels_that_two_batch_norms_read_go_from_both() -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.bn_left(y := m.conv(x)) + m.bn_right(y))),
        conv=conv(3, 4, bias=False),
        bn_left=nn.BatchNorm2d(4),
        bn_right=nn.BatchNorm2d(4),
        out=conv(4, 5),
    )
    net.double().eval()
    with torch.no_grad():
        for name in ("bn_left.bias", "bn_right.bias"):
            net.get_parameter(name).uniform_(0.5, 1)
    gone = smallest_filters(net, 0.5, ["conv"])["conv"]
    result = soft(net, ratio=0.5, scope="all")
    with torch.no_grad():
        after = result.model(images())
        for name in ("bn_left", "bn_right"):
            for kind in ("weight", "bias"):
                net.get_parameter(f"{name}.{kind}")[gone] = 0.0
        assert (after - net(images())).abs().max() < 1e-10
    assert set(result.architecture.masks) == {
        "conv.weight",
        *(f"{norm}.{kind}" for norm in ("bn_left", "bn_right") for kind in ("weight", "bias")),
    }


def test_the_network_itself_and_its_mode_are_untouched() -> None:
    model = built().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = soft(model, ratio=0.3, scope="all")
    assert model.training
    assert result.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("network", "epochs"),
    [
        # At ratios 0.1, 0.2, 0.3; re-counted from the reference code's FLOPs, which include batch norms.
        ("resnet20", (435, 491, 550)),
        ("resnet32", (435, 491, 551)),
        ("resnet56", (436, 491, 551)),
        ("resnet110", (436, 491, 551)),
    ],
)
def test_longer_scratch_b_is_within_an_epoch_of_the_published_one(network: str, epochs: tuple[int, ...]) -> None:
    model = build_model(network)
    for ratio, published in zip((0.1, 0.2, 0.3), epochs, strict=True):
        pruner = SoftFilter(ChannelOptions(name="soft_filter", ratio=ratio))
        target = pruner.target(model, torch.zeros(1, 3, 32, 32))
        ours = scratch_b_epochs(400, target.full_cost.macs, target.cost.macs)
        assert abs(ours - published) <= 1
