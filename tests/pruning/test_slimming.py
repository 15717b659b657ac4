"""Network slimming: its penalty, the published threshold, and networks whose batch norms select channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import Net
from rethink_prune import build_model, count_cost, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.pruner import PruneResult
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.hooks import TrainingHooks

SIZE = 16
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)
# Networks of the publication: each batch norm follows one convolution, or selects channels of a stream.
PUBLISHED: dict[str, dict[str, Any]] = {"vgg11": {"head": "linear"}, "preresnet20": {}, "densenet40": {}}


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def slim(model: nn.Module, **options: Any) -> PruneResult:
    return prune(model, "slimming", example=EXAMPLE, **options)


def with_scales(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms scales of both signs, shifts and statistics that no channel shares; float64, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                size = module.num_features
                module.weight.copy_((draw(size) + 0.2) * torch.where(draw(size) < 0.5, -1.0, 1.0))
                module.bias.copy_(draw(size) - 0.5)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(draw(size) - 0.5)
                module.running_var.copy_(draw(size) + 0.5)
    return model


def built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_scales(build_model(name, **options))


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def published_masks(model: nn.Module, ratio: float) -> dict[str, torch.Tensor]:
    """Return what the published rule keeps of each 2-D batch norm."""
    scales = {name: norm.weight.detach().abs() for name, norm in norms_of(model).items()}
    ordered, _ = torch.sort(torch.cat(list(scales.values())))
    threshold = ordered[int(len(ordered) * ratio)]
    return {name: scale.gt(threshold) for name, scale in scales.items()}


def masked_output(model: nn.Module, keep: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Run the full network with gamma and beta of what is not kept set to zero; the network is changed."""
    with torch.no_grad():
        for name, mask in keep.items():
            norm = model.get_submodule(name)
            norm.get_parameter("weight").mul_(mask)
            norm.get_parameter("bias").mul_(mask)
        return model(images)


def kept_by(result: PruneResult, model: nn.Module) -> dict[str, torch.Tensor]:
    """Tell which channels of each 2-D batch norm remain, by its scales, of which no two are equal."""
    pruned = norms_of(result.model)
    return {name: torch.isin(norm.weight, pruned[name].weight) for name, norm in norms_of(model).items()}


def images(size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- the penalty -----------------------------------------------------------------------------------------


def penalty(model: nn.Module, **options: Any) -> TrainingHooks:
    found = find_pruner("slimming")
    chosen = found(found.options_type.model_validate({"name": "slimming", "ratio": 0.5, **options}))
    return chosen.sparse(chosen.target(model, EXAMPLE))


@pytest.mark.parametrize("linear", [False, True])
def test_penalty_adds_strength_times_sign_of_gamma_and_nothing_else(linear: bool) -> None:
    model = built("vgg11")
    with torch.no_grad():
        model.get_parameter("features.1.weight")[0] = 0.0
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    penalty(model, linear=linear, sparse={"strength": 0.25}).before_step(model, 0.1)
    penalised = {f"{name}.weight" for name in norms_of(model)} | ({"classifier.1.weight"} if linear else set())
    assert len(penalised) == 8 + linear
    for name, parameter in model.named_parameters():
        added = 0.25 * parameter.sign() if name in penalised else torch.zeros_like(parameter)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[name] + added), name
    assert penalised >= {"features.1.weight"}
    gradient = model.get_parameter("features.1.weight").grad
    assert gradient is not None
    assert gradient[0] == before["features.1.weight"][0], "the subgradient at zero is zero"


def test_penalty_acts_on_batch_norms_that_cannot_be_pruned() -> None:
    model = built("preresnet20")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty(model, skip=["layer1.*"], sparse={"strength": 0.5}).before_step(model, 0.1)
    for norm in norms_of(model).values():
        assert torch.equal(norm.weight.grad, 0.5 * norm.weight.sign())  # type: ignore[arg-type]


def test_penalty_leaves_out_scales_without_gradient() -> None:
    model = built("vgg11")
    penalty(model, sparse={"strength": 0.25}).before_step(model, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- the published threshold -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", PUBLISHED)
def test_same_channels_per_batch_norm_as_the_published_rule(name: str, ratio: float) -> None:
    model = built(name, **PUBLISHED[name])
    expected = published_masks(model, ratio)
    total = sum(norm.num_features for norm in norms_of(model).values())
    result = slim(model, ratio=ratio)
    layers = result.report.layers
    assert sum(layer.full for layer in layers) == total, "every batch norm takes part"
    assert sum(layer.full - layer.kept for layer in layers) == int(total * ratio) + 1
    kept = kept_by(result, model)
    assert {name: mask.tolist() for name, mask in kept.items()} == {
        name: mask.tolist() for name, mask in expected.items()
    }
    selected = {layer.layer.removesuffix(".selected"): layer for layer in layers if layer.layer.endswith(".selected")}
    for norm, layer in selected.items():
        assert torch.equal(result.architecture.selections[norm], expected[norm].nonzero().flatten())
        assert layer.kept == int(expected[norm].sum())
    assert set(result.architecture.selections) <= set(selected)
    assert result.report.warnings == ()


def test_only_batch_norms_of_shared_streams_select() -> None:
    for name, selecting in [
        ("vgg11", set()),
        ("preresnet20", {"bn"} | {f"layer{s}.{b}.bn1" for s in (1, 2, 3) for b in (0, 1)}),
        ("densenet40", set(norms_of(built("densenet40")))),
    ]:
        layers = slim(built(name, **PUBLISHED[name]), ratio=0.1).report.layers
        assert {layer.layer[: -len(".selected")] for layer in layers if layer.layer.endswith(".selected")} == selecting


def test_growth_and_streams_of_dense_and_pre_activation_networks_stay_whole() -> None:
    for name in ("densenet40", "preresnet20"):
        model = built(name)
        pruned = slim(model, ratio=0.5).model
        writers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        if name == "preresnet20":
            writers = [n for n in writers if not n.endswith((".conv1", ".conv2"))]
        assert writers
        for writer in writers:
            full, kept = model.get_submodule(writer), pruned.get_submodule(writer)
            assert isinstance(full, nn.Conv2d)
            assert isinstance(kept, nn.Conv2d)
            assert kept.out_channels == full.out_channels
            assert kept.in_channels <= full.in_channels


@pytest.mark.parametrize("name", [*PUBLISHED, "resnet20"])
def test_pruned_equals_the_network_with_gamma_and_beta_zero(name: str) -> None:
    model = built(name, **PUBLISHED.get(name, {}))
    result = slim(model, ratio=0.5)
    with torch.no_grad():
        before, after = model(images()), result.model(images())
    expected = masked_output(model, kept_by(result, model), images())
    assert (after - expected).abs().max() < 1e-10
    assert (before - expected).abs().max() > 1e-3, "masking changed nothing, so the comparison shows nothing"


@pytest.mark.parametrize("name", [*PUBLISHED, "resnet20"])
def test_rebuilt_from_data_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    options = PUBLISHED.get(name, {})
    result = slim(built(name, **options), ratio=0.5)
    result.architecture.save(tmp_path)
    rebuilt = reshape(build_model(name, **options).double().eval(), Architecture.load(tmp_path))
    rebuilt.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(images()), result.model(images()))


# ---- limits and targets ----------------------------------------------------------------------------------


def test_layer_that_the_threshold_would_empty_keeps_its_best_channel_and_is_named() -> None:
    model = built("vgg11", head="linear")
    with torch.no_grad():
        norm = model.get_submodule("features.5")
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.mul_(1e-6)
        norm.weight[37] = -1e-3
    result = slim(model, ratio=0.5)
    kept = {layer.layer: layer.kept for layer in result.report.layers}
    assert kept["features.4"] == 1
    assert result.report.warnings == (
        "features.4: the threshold would have emptied it; its best 1 stay",
        "less than 10 % of features.4: 1 of 128; pruner.min_share=0.1 keeps a share of every layer",
    )
    shares = {x.layer: x.kept / x.full for x in slim(model, ratio=0.5, min_share=0.25).report.layers}
    assert min(shares.values()) == shares["features.4"] == 0.25
    assert torch.equal(result.model.get_parameter("features.5.weight"), norm.weight[[37]])
    total = sum(layer.full for layer in result.report.layers)
    assert sum(layer.full - layer.kept for layer in result.report.layers) == int(total * 0.5) + 1 - 1


@pytest.mark.parametrize(("target", "share"), [("macs", 0.6), ("params", 0.3)])
@pytest.mark.parametrize("name", ["vgg11", "preresnet20"])
def test_cost_target_is_met_within_one_percent_by_one_threshold(name: str, target: str, share: float) -> None:
    model = built(name)
    result = slim(model, **{f"target_{target}": share})
    shape = (3, SIZE, SIZE)
    reached = getattr(count_cost(result.model, shape), target) / getattr(count_cost(model, shape), target)
    assert abs(reached - share) <= 0.01 * share
    scales = {name: norm.weight.detach().abs() for name, norm in norms_of(model).items()}
    kept = kept_by(result, model)
    lowest_kept = sorted(float(scales[name][kept[name]].min()) for name in scales)
    highest_gone = sorted(float(scales[name][~kept[name]].max()) for name in scales if not kept[name].all())
    # One threshold up to the last step of the search, which narrows some layers and not yet the others.
    assert highest_gone[-1] - lowest_kept[0] < 0.01


def test_floor_rounding_and_skip() -> None:
    model = built("vgg11", head="linear")
    skipped = "features.0"
    with torch.no_grad():
        model.get_parameter("features.5.weight").mul_(1e-3)
    plain = {layer.layer: layer.kept for layer in slim(model, ratio=0.7, skip=[skipped]).report.layers}
    result = slim(model, ratio=0.7, skip=[skipped], min_channels=12, round_to=8)
    rounded = {layer.layer: layer.kept for layer in result.report.layers}
    assert plain.pop(skipped) == rounded.pop(skipped) == 64
    assert plain["features.4"] == 1
    assert rounded == {layer: max(16, -(-kept // 8) * 8) for layer, kept in plain.items()}


def test_skipped_layers_do_not_count_in_the_share() -> None:
    model = built("vgg11", head="linear")
    layers = slim(model, ratio=0.5, skip=["features.2*"]).report.layers
    ranked = [layer for layer in layers if not layer.layer.startswith("features.2")]
    assert 0 < len(ranked) < len(layers)
    assert sum(layer.full - layer.kept for layer in ranked) == sum(layer.full for layer in ranked) // 2 + 1
    assert all(layer.kept == layer.full for layer in layers if layer not in ranked)


def test_a_ratio_per_layer_drops_the_smallest_scales_of_each() -> None:
    model = built("vgg11", head="linear")
    result = slim(model, ranking="layer", ratio=0.25)
    assert all(layer.kept == layer.full * 3 // 4 for layer in result.report.layers)
    for name, norm in norms_of(model).items():
        best = norm.weight.abs().topk(norm.num_features * 3 // 4).indices.sort().values
        assert torch.equal(result.model.get_parameter(f"{name}.weight"), norm.weight[best])


def test_hidden_layer_of_the_head_takes_part_only_if_asked() -> None:
    model = built("vgg11")
    with torch.no_grad():
        model.get_parameter("classifier.1.weight")[:200].mul_(1e-3)
    assert "classifier.0" not in [layer.layer for layer in slim(model, ratio=0.1).report.layers]
    result = slim(model, ratio=0.05, linear=True)
    hidden = next(layer for layer in result.report.layers if layer.layer == "classifier.0")
    total = sum(layer.full for layer in result.report.layers)
    assert (hidden.full, hidden.kept) == (512, 512 - int(total * 0.05) - 1)
    assert result.model.get_parameter("classifier.3.weight").shape == (10, hidden.kept)
    keep = torch.isin(model.get_parameter("classifier.1.weight"), result.model.get_parameter("classifier.1.weight"))
    with torch.no_grad():
        after = result.model(images())
    expected = masked_output(model, {**kept_by(result, model), "classifier.1": keep}, images())
    assert (after - expected).abs().max() < 1e-10


# ---- odd networks ----------------------------------------------------------------------------------------


def test_scales_that_are_all_equal_are_refused() -> None:
    with pytest.raises(UserError, match=r"all 2752 channels score 1, so none is worth less than another; give it a"):
        slim(build_model("vgg11"), ratio=0.5)


def test_target_out_of_reach_is_refused_before_any_training() -> None:
    found = find_pruner("slimming")
    pruner = found(parse_pruner({"name": "slimming", "target_macs": 0.0001}, found.options_type))
    with pytest.raises(
        UserError, match=r"pruner\.target_macs=0\.0001: out of reach; the least that can remain is \d+ of"
    ):
        pruner.target(build_model("resnet20"), EXAMPLE)


def test_network_without_batch_norm_is_refused() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 5))
    with pytest.raises(UserError, match=r"^pruner\.name=slimming: .* Net has none$"):
        slim(net, ratio=0.5)


def test_batch_norm_without_scale_is_refused() -> None:
    net = Net(
        lambda m, x: m.out(m.bare(m.b(m.norm(m.a(x))))),
        a=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        b=conv(4, 4),
        bare=nn.BatchNorm2d(4, affine=False),
        out=conv(4, 5),
    )
    with pytest.raises(UserError, match=r"^pruner\.name=slimming: .* bare has none \(affine=False\)$"):
        slim(net, ratio=0.5)


def test_two_batch_norms_in_a_row_score_the_mean_of_their_scales() -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.second(m.first(m.a(x))))),
        a=conv(3, 4),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
        out=conv(4, 5),
    )
    with_scales(net)
    with torch.no_grad():
        net.get_parameter("first.weight").copy_(torch.tensor([4.0, 1.0, 2.0, 3.0]))
        net.get_parameter("second.weight").copy_(torch.tensor([0.5, -6.0, 1.0, 0.6]))  # means 2.25, 3.5, 1.5, 1.8
    result = slim(net, ratio=0.25)
    assert torch.equal(result.model.get_parameter("a.weight"), net.get_parameter("a.weight")[[0, 1]])


def test_two_batch_norms_of_one_convolution_select_apart_and_its_channels_stay() -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.left(y := m.a(x))) + m.b(F.relu(m.right(y)))),
        a=conv(3, 6),
        left=nn.BatchNorm2d(6),
        right=nn.BatchNorm2d(6),
        b=conv(6, 6),
        out=conv(6, 5),
    )
    with_scales(net)
    result = slim(net, ratio=0.4)
    assert [layer.layer for layer in result.report.layers] == ["right.selected"], "left is tied to an addition"
    assert result.model.get_parameter("a.weight").shape[0] == 6
    with torch.no_grad():
        after = result.model(images())
    assert (after - masked_output(net, kept_by(result, net), images())).abs().max() < 1e-10


def test_group_of_a_grouped_convolution_scores_the_mean_of_its_scales() -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.after(m.b(F.relu(m.before(m.a(x))))))),
        a=conv(3, 6),
        before=nn.BatchNorm2d(6),
        b=conv(6, 6, groups=3),
        after=nn.BatchNorm2d(6),
        out=conv(6, 5),
    )
    with_scales(net.train())
    net.train()
    with torch.no_grad():
        net.get_parameter("before.weight").copy_(torch.tensor([1.0, 1.0, 3.0, 0.1, 1.0, 1.0]))
        net.get_parameter("after.weight").copy_(torch.tensor([1.0, -1.0, 3.0, 0.1, 0.9, 0.9]))
    result = slim(net, ratio=0.2)
    assert result.model.training
    assert torch.equal(result.model.get_parameter("b.weight"), net.get_parameter("b.weight")[[0, 1, 2, 3]])
    with torch.no_grad():
        after = result.model.eval()(images())
    keep = torch.tensor([True] * 4 + [False] * 2)
    assert (after - masked_output(net.eval(), {"before": keep, "after": keep}, images())).abs().max() < 1e-10


def test_of_a_layer_only_channels_that_pass_a_batch_norm_are_pruned() -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.b(m.part(m.a(x)[:, :4])))),
        a=conv(3, 6),
        part=nn.BatchNorm2d(4),
        b=conv(4, 6),
        norm=nn.BatchNorm2d(6),
        out=conv(6, 5),
    )
    result = slim(with_scales(net), ratio=0.3)
    assert [(layer.layer, layer.full) for layer in result.report.layers] == [("a", 4), ("b", 6)]


def test_scope_all_ranks_the_streams_of_a_residual_network_too() -> None:
    model = built("resnet20")
    result = slim(model, ratio=0.4, scope="all")
    layers = {layer.layer: layer for layer in result.report.layers}
    assert {"conv1", "layer2.0.conv2", "layer3.0.conv2"} <= set(layers)
    gone = sum(layer.full - layer.kept for layer in layers.values())
    total = sum(layer.full for layer in layers.values())
    assert gone == int(total * 0.4) + 1 - sum("emptied" in warning for warning in result.report.warnings), (
        "a layer that would be empty keeps one"
    )
    with torch.no_grad():
        after = result.model(images())
    expected = masked_output(model, kept_by(result, model), images())
    assert (after - expected).abs().max() < 1e-10
    assert result.model.get_parameter("fc.weight").shape[1] < 64


def test_layers_that_are_not_for_slimming_are_listed() -> None:
    net = Net(
        lambda m, x: m.fc(m.c(F.relu(m.b(F.relu(m.norm(m.a(x)))))).mean((2, 3))),
        a=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        b=conv(4, 4),
        c=conv(4, 4),
        fc=nn.Linear(4, 5),
    )
    report = slim(with_scales(net).float(), ratio=0.5).report
    assert [layer.layer for layer in report.layers] == ["a"]
    left = "not for slimming, which leaves it alone"
    assert report.frozen == {"fc": "network output", "b": left, "c": left}


@pytest.mark.parametrize("target", ["target_macs", "target_params"])
def test_a_target_that_removes_nothing_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=f"pruner.{target}=0.9999: removes nothing"):
        slim(with_scales(build_model("resnet20")).float(), **{target: 0.9999})
