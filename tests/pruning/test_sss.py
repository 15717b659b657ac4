"""Sparse Structure Selection: how factors are trained and folded, and that removing zeros changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Lasso
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from harness import randomise
from rethink_prune import build_model, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.pruning import PruneResult
from rethink_prune.pruning.factors import ScalingFactors
from rethink_prune.pruning.sss import SSS, SSSOptions, SSSTarget
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.hooks import TrainingFailed

NAME = "rethink_prune.pruning.sss:SSS"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small_resnext() -> nn.Module:
    """Return a torchvision ResNeXt of four blocks with four groups each, and 3 x 3 channels in the stem."""
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=4)


def no_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 10)
    )


def make(model: nn.Module, network: str | None = None, **options: Any) -> tuple[SSS, SSSTarget]:
    pruner = SSS(parse_pruner({"name": "sss", **options}, SSSOptions))
    return pruner, pruner.target(model, torch.zeros(1, 3, 32, 32), network)


def factor_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(".factor")}


def set_factors(model: nn.Module, share_of_zeros: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factor_parameters(model).values():
            factor.copy_(torch.rand(factor.shape, generator=generator) + 0.5)
            factor[torch.rand(factor.shape, generator=generator) < share_of_zeros] = 0


def prune_folded(pruner: SSS, target: SSSTarget, model: nn.Module) -> PruneResult:
    return pruner.prune(model, target, data=None, generator=torch.Generator())


# ---- the proximal step -----------------------------------------------------------------------------------


class Weighted(nn.Module):
    """A convolution whose factors are all there is to train."""

    def __init__(self, factors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, factors, 1, dtype=torch.float64)


def weighted(factors: int, strength: float) -> tuple[Weighted, ScalingFactors, nn.Parameter]:
    model = Weighted(factors)
    hooks = ScalingFactors({"conv": [(i,) for i in range(factors)]}, strength=strength, momentum=0.9)
    hooks.prepare(model)
    return model, hooks, model.conv.factor


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_a_step_equals_the_published_forms_of_the_method(size: float) -> None:
    strength, momentum = 0.3 * size, 0.9
    generator = torch.Generator().manual_seed(0)
    model, hooks, factor = weighted(8, strength)
    ahead = torch.ones(8, dtype=torch.float64)  # as in the publication: one sequence and a velocity
    velocity = torch.zeros_like(ahead)
    now, before = torch.ones_like(ahead), torch.ones_like(ahead)  # two sequences of iterates
    for step in range(50):
        lr = 0.1 if step < 30 else 0.01
        gradient = size * torch.randn(8, generator=generator, dtype=torch.float64)
        factor.grad = gradient.clone()
        hooks.after_step(model, lr)
        assert factor.grad is None

        z = factor_ahead(now, before, momentum) - lr * gradient
        now, before = (z.abs() - lr * strength).clamp(min=0) * (z > 0), now
        torch.testing.assert_close(factor.detach(), factor_ahead(now, before, momentum), rtol=0, atol=1e-12)
        # The publication's form has no bound at zero, so it is the same as long as nothing gets there.
        z = ahead - lr * gradient
        s = z.sign() * (z.abs() - lr * strength).clamp(min=0)
        velocity = s - ahead + momentum * velocity
        ahead = s + momentum * velocity
        if size < 1:
            torch.testing.assert_close(factor.detach(), ahead, rtol=0, atol=1e-12)
    assert (size == 1) == bool((factor == 0).any())
    assert not (factor < 0).any()


def factor_ahead(now: torch.Tensor, before: torch.Tensor, momentum: float) -> torch.Tensor:
    return (now + momentum * (now - before)).clamp(min=0)


def test_a_factor_that_runs_away_fails_the_training() -> None:
    model, hooks, factor = weighted(3, 0.1)
    with torch.no_grad():
        factor[1] = 0.0
    assert hooks.after_epoch(model) == {"zero_factors": pytest.approx(100 / 3)}
    with torch.no_grad():
        factor[1] = 101.0
    with pytest.raises(TrainingFailed, match="a scaling factor became 101, where they start at 1"):
        hooks.after_epoch(model)


def test_converges_to_the_lasso_of_factors_from_zero_with_exact_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    y = x[:, 0] + 2 * x[:, 3] - x[:, 5] + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
    model, hooks, factor = weighted(10, strength=0.2)
    for _ in range(500):
        (0.5 * (x @ factor - y).square().mean()).backward()
        hooks.after_step(model, lr=0.1)
    expected = torch.from_numpy(
        Lasso(alpha=0.2, fit_intercept=False, positive=True, tol=1e-14, max_iter=10000).fit(x, y).coef_
    )
    torch.testing.assert_close(factor.detach(), expected, rtol=0, atol=1e-10)
    assert torch.equal(factor == 0, expected == 0)
    assert 0 < int((expected == 0).sum()) < 10


# ---- factors in a network --------------------------------------------------------------------------------


def test_factors_start_at_one_and_no_optimiser_has_them() -> None:
    model = randomise(build_model("resnet20"))
    plain, parameters = copy.deepcopy(model), {id(p) for p in model.parameters()}
    pruner, target = make(model)
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    assert len(factor_parameters(model)) == 9
    assert all(torch.equal(f, torch.ones(1, dtype=f.dtype)) for f in factor_parameters(model).values())
    assert {id(p) for p in hooks.optimized(model)} == parameters
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize(
    ("build", "structures"),
    [
        (lambda: build_model("resnet20"), ["blocks", "channels"]),
        (lambda: build_model("preresnet20"), ["blocks", "channels"]),
        (small_resnext, ["blocks", "groups", "channels"]),
        (lambda: build_model("vgg16"), ["channels"]),
        (no_norms, ["channels"]),
        (lambda: models.mobilenet_v2(num_classes=10), ["blocks", "channels"]),
    ],
)
def test_scaled_equals_folded_equals_pruned_equals_rebuilt(
    build: Callable[[], nn.Module], structures: list[str], tmp_path: Path
) -> None:
    model = randomise(build())
    keys = list(model.state_dict())
    pruner, target = make(model, structures=structures)
    assert {structure.kind for structure in target.structures} == set(structures)
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    set_factors(model, 0.4)
    with torch.no_grad():
        scaled = model(IMAGES)
        hooks.finish(model)
        folded = model(IMAGES)
        assert list(model.state_dict()) == keys
        assert not any(module._forward_hooks for module in model.modules())
        assert (folded - scaled).abs().max() < 1e-10

        result = prune_folded(pruner, target, model)
        assert (result.model(IMAGES) - folded).abs().max() < 1e-10
        assert all(layer.kept < layer.full for layer in result.report.layers if layer.full > 20)
        assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())

        result.architecture.save(tmp_path)
        save_file(result.model.state_dict(), tmp_path / "model.safetensors")
        rebuilt = reshape(build().double().eval(), Architecture.load(tmp_path))
        rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(rebuilt(IMAGES), result.model(IMAGES))


@pytest.mark.parametrize(
    ("build", "end"),
    [(lambda: build_model("resnet20"), "layer1.1.bn2"), (lambda: build_model("preresnet20"), "layer2.0.conv3")],
)
def test_removing_a_block_at_zero_changes_nothing_at_all(build: Callable[[], nn.Module], end: str) -> None:
    model = randomise(build())
    pruner, target = make(model)
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    with torch.no_grad():
        model.get_parameter(f"{end}.factor").zero_()
        scaled = model(IMAGES)
        hooks.finish(model)
        result = prune_folded(pruner, target, model)
        assert torch.equal(result.model(IMAGES), scaled)
    assert result.architecture.removed == (end,)
    assert [layer.layer for layer in result.report.layers if layer.kept == 0] == [end]
    result.model.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_a_copy_and_a_checkpoint_of_a_network_with_factors_go_on_alike() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20")
    pruner, target = make(model, structures=["blocks", "channels"], sparse={"strength": 0.5})
    hooks = pruner.sparse(target)
    fresh = copy.deepcopy(model)
    hooks.prepare(model)
    step(model, hooks)
    copied = copy.deepcopy(model)
    hooks.prepare(fresh)
    fresh.load_state_dict(model.state_dict())
    for network in (model, copied, fresh):
        step(network, hooks)
    for network in (copied, fresh):
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in model.state_dict().items())
    hooks.finish(copied)
    assert not any(module._forward_hooks for module in copied.modules())
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_factors_keep_their_precision_and_the_output_its_type_and_layout() -> None:
    model = build_model("resnet20").to(memory_format=torch.channels_last)
    pruner, target = make(model)
    pruner.sparse(target).prepare(model)
    seen: list[torch.Tensor] = []
    model.get_submodule("layer1.0.bn2").register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES.float().to(memory_format=torch.channels_last)).sum().backward()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for factor in factor_parameters(model).values():
        assert factor.dtype == torch.float32
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32


def step(model: nn.Module, hooks: ScalingFactors, lr: float = 0.05) -> None:
    """Take one training step on fixed data."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(hooks.optimized(model), lr, momentum=0.9, weight_decay=1e-4)
    loss = F.cross_entropy(model.train()(IMAGES.float()), torch.tensor([1, 2]))
    optimizer.zero_grad()
    loss.backward()
    hooks.before_step(model, lr)
    optimizer.step()
    hooks.after_step(model, lr)


def test_training_drives_factors_to_zero_and_pruning_removes_them() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20")
    pruner, target = make(model, sparse={"strength": 1.0})
    hooks = pruner.sparse(target)
    hooks.prepare(model)
    for _ in range(20):
        step(model, hooks)
    gone = [name.removesuffix(".factor") for name, factor in factor_parameters(model).items() if factor == 0]
    hooks.finish(model)
    result = prune_folded(pruner, target, model)
    assert gone
    assert result.architecture.removed == tuple(gone)
    images = IMAGES.float()
    assert torch.equal(result.model.eval()(images), model.eval()(images))


# ---- what goes -------------------------------------------------------------------------------------------


def test_the_default_structures_follow_the_network() -> None:
    for model, kinds in (
        (build_model("resnet20"), {"blocks"}),
        (build_model("vgg16"), {"channels"}),
        (small_resnext(), {"blocks", "groups"}),
    ):
        assert {structure.kind for structure in make(model)[1].structures} == kinds


def test_groups_of_a_removed_block_go_with_it_and_an_emptied_layer_keeps_one() -> None:
    model = randomise(small_resnext())
    pruner, target = make(model)
    with torch.no_grad():
        for name in ("layer1.0.bn3", "layer1.0.bn2", "layer2.0.bn2"):
            model.get_parameter(f"{name}.weight").zero_()
            model.get_parameter(f"{name}.bias").zero_()
        result = prune_folded(pruner, target, model)
        assert (result.model(IMAGES) - model(IMAGES)).abs().max() < 1e-10
    kept = {layer.layer: layer.kept for layer in result.report.layers}
    assert (kept["layer1.0.bn3"], kept["layer1.0.conv1"], kept["layer2.0.conv1"], kept["layer3.0.conv1"]) == (
        0,
        0,
        1,
        4,
    )
    assert not any(name.startswith("layer1.0.conv") for name in result.architecture.modules)
    assert result.report.warnings == ("layer2.0.conv1: all of its factors are zero; one of its groups stays",)
    assert result.model.get_submodule("layer2.0.conv2").groups == 1


def test_nothing_at_zero_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no factor reached zero.*raise pruner\.sparse\.strength.*of layer\d\.\d\.bn2"):
        prune(randomise(build_model("resnet20")), NAME, example=IMAGES)


@pytest.mark.parametrize(
    ("variant", "removed", "epochs"),
    [
        (41, {"layer1": "012", "layer2": "", "layer3": "", "layer4": ""}, 117),
        (32, {"layer1": "02", "layer2": "", "layer3": "45", "layer4": "12"}, 145),
        (26, {"layer1": "012", "layer2": "03", "layer3": "0", "layer4": "12"}, 179),
    ],
)
def test_published_variants_and_their_epochs_of_scratch_b(variant: int, removed: dict[str, str], epochs: int) -> None:
    with torch.device("meta"):  # shapes are all a known target needs
        model = build_model("preact_resnet50", num_classes=1000)
    pruner = SSS(parse_pruner({"name": "sss", "variant": variant}, SSSOptions))
    target = pruner.target(model, torch.zeros(1, 3, 224, 224), "preact_resnet50")
    architecture = target.architecture()
    assert target.known
    assert (pruner.options.target_option, pruner.options.variant) == ("variant", str(variant))
    assert architecture.removed == tuple(f"{stage}.{b}.conv3" for stage, blocks in removed.items() for b in blocks)
    assert [layer.layer for layer in target.report().layers if not layer.kept] == list(architecture.removed)
    # 100 epochs times the ratio of MACs, as published.
    assert int(100 * target.full_cost.macs / target.cost.macs) == epochs
    assert "layer1.0.projection.weight" in reshape(model, architecture).state_dict()


def test_a_variant_removes_its_blocks_whatever_the_factors_say() -> None:
    model = build_model("preact_resnet50", num_classes=10)
    with torch.no_grad():
        model.get_parameter("layer3.0.conv3.weight").zero_()
    result = prune(model, NAME, example=IMAGES, variant="41")
    assert result.architecture.removed == ("layer1.0.conv3", "layer1.1.conv3", "layer1.2.conv3")
    assert torch.equal(result.model.get_parameter("fc.weight"), model.get_parameter("fc.weight"))


def test_without_a_variant_the_strength_decides_and_nothing_is_known() -> None:
    pruner, target = make(build_model("resnet20"), sparse={"strength": 0.3})
    assert not target.known
    assert getattr(pruner.options, pruner.options.target_option) == 0.3
    assert all(layer.kept == layer.full == 1 for layer in target.report().layers)
    key = pruner.sparse(target).key
    assert key["strength"] == 0.3
    assert key["factors"]["layer1.0.bn2"] == 1


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"ratio": 0.5},
            "pruner.ratio=0.5: sss takes no ratio; pruner.sparse.strength decides how much goes "
            "(or give a published variant)",
        ),
        (
            {"target_macs": 0.5},
            "pruner.target_macs=0.5: sss takes no target_macs; pruner.sparse.strength decides how much goes "
            "(or give a published variant)",
        ),
        ({"sparse": {"strength": 0}}, "pruner.sparse.strength=0: must be greater than 0"),
        ({"structures": ["block"]}, "pruner.structures.0=block: must be blocks, groups or channels"),
        (
            {"structures": []},
            "pruner.structures=[]: name each of blocks, groups and channels at most once, and at least one",
        ),
        (
            {"structures": ["channels"], "variant": 41},
            "pruner: variant=41 removes blocks; use it with structures=null",
        ),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pruner({"name": "sss", **options}, SSSOptions)
    assert str(error.value) == line


def test_structures_that_the_network_does_not_have_are_one_line() -> None:
    with pytest.raises(UserError) as error:
        make(build_model("vgg16"), "vgg16", structures=["blocks"])
    assert (
        str(error.value)
        == "pruner.structures=[blocks]: finds no blocks that factors can scale in vgg16; it has channels"
    )
    with pytest.raises(UserError) as error:
        make(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert str(error.value).startswith("pruner.name=sss: finds no channels that factors can scale in Sequential")


def test_an_unknown_variant_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no such variant of resnet20; there are preact_resnet50: 41, 32, 26"):
        make(build_model("resnet20"), "resnet20", variant=41)


def test_blocks_that_cannot_be_removed_are_said_with_the_reason() -> None:
    model = models.mnasnet0_5(num_classes=10)
    model.classifier.insert(0, StochasticDepth(0.5, "row"))  # calls a function with training=True or False
    with pytest.raises(UserError, match=r"structures=\[blocks\]: finds no blocks .* run different operations"):
        make(model, structures=["blocks"])
    assert "run different operations" in " ".join(make(model)[1].report().warnings)


def test_channels_that_end_in_a_norm_without_scale_stay_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model.extend([nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    target = make(model)[1]
    assert [structure.name for structure in target.structures] == ["3"]
    assert target.report().frozen["0"] == "1: cannot be scaled"


def test_channels_that_reach_several_norms_stay_whole() -> None:
    target = make(build_model("preresnet20"), structures=["channels"])[1]
    assert "layer1.0.conv1" in {structure.name for structure in target.structures}
    assert target.report().frozen["conv1"].startswith("no single convolution or batch norm")


def test_additions_of_numbers_are_no_blocks() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = x.shape[2] + x.shape[3]
            return self.fc(self.second(self.first(x).relu()).mean((2, 3)) * size)

    assert {structure.kind for structure in make(Sized())[1].structures} == {"channels"}
