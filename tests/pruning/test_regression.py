"""Channel pruning by regression: selection and reconstruction with known solutions, and the networks it leaves."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.linear_model import LinearRegression, lasso_path
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import mask
from rethink_prune import build_model, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import Choice
from rethink_prune.pruning.least_squares import Products, best_ridge, ridge_towards, select_by_lasso
from rethink_prune.pruning.reconstruction import WorkingCopy
from rethink_prune.pruning.regression import Regression

EXAMPLE = torch.zeros(1, 3, 32, 32)


def regression(**options: Any) -> Regression:
    return Regression(parse_pruner({"name": "regression", **options}, Regression.options_type))


def batches(count: int = 40, size: int = 32, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Smooth random images, whose channels and neighbours are correlated as those of photographs."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=dtype)
    images = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return [(part, torch.zeros(len(part))) for part in images.split(16)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised_norms(model: nn.Module) -> nn.Module:
    """Float64, with batch norms that shift and scale."""
    model = model.double().eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                assert tensor is not None
                tensor.detach().add_(torch.randn(tensor.shape, generator=generator(norm.num_features)) / 4)
    return model


# ---- selection and reconstruction -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_selection_is_on_the_lasso_path(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(60, 10)) @ (np.eye(10) + rng.normal(size=(10, 10)) / 3)
    y = z.sum(1) + rng.normal(size=60)
    _, path, _ = lasso_path(
        z, y, alphas=np.geomspace(abs(z.T @ y).max(), 1e-4, 2000) / len(z), tol=1e-10, max_iter=100_000
    )
    supports = [tuple(np.flatnonzero(coefficients).tolist()) for coefficients in path.T]
    for count in range(1, 10):
        chosen = tuple(select_by_lasso(z.T @ z, z.T @ y, count))
        assert len(chosen) == count
        if any(len(support) == count for support in supports):
            assert chosen in supports


def test_duplicates_combinations_and_dead_channels_are_not_selected() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 6))
    z = np.hstack([z, z[:, [1]], z[:, [2]] * 0.3 + z[:, [4]] * 0.3, np.zeros((200, 1))])
    chosen = select_by_lasso(z.T @ z, z.T @ z.sum(1), 6)
    residual = z.sum(1) - z[:, chosen] @ np.linalg.lstsq(z[:, chosen], z.sum(1), rcond=None)[0]
    assert np.linalg.norm(residual) < 1e-8
    assert np.linalg.matrix_rank(z[:, chosen]) == 6
    assert 8 not in chosen


def test_a_path_that_ends_early_is_filled_up() -> None:
    z = np.zeros((10, 4))
    z[:, 2] = 1.0
    chosen = select_by_lasso(z.T @ z, z.T @ z.sum(1), 3)
    assert len(set(chosen)) == 3
    assert 2 in chosen
    assert select_by_lasso(np.zeros((4, 4)), np.zeros(4), 2) == [0, 1]


def test_the_ridge_pulls_towards_the_old_weights() -> None:
    rng = np.random.default_rng(0)
    x, y, old = rng.normal(size=(50, 6)), rng.normal(size=(50, 3)), rng.normal(size=(6, 3))
    for ridge in (1e-6, 0.1, 1e9):
        rho = ridge * (x**2).sum(0).mean()
        # The same as ordinary least squares with rows that ask for the old weights.
        rows, right = np.vstack([x, np.sqrt(rho) * np.eye(6)]), np.vstack([y, np.sqrt(rho) * old])
        expected = np.linalg.lstsq(rows, right, rcond=None)[0]
        found = ridge_towards(old, x.T @ x, x.T @ y, ridge)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.linalg.norm(y - x @ found) <= np.linalg.norm(y - x @ old)
    np.testing.assert_allclose(found, old, rtol=1e-6)
    few = x[:4]  # fewer positions than features: the old weights decide what the sample leaves open
    assert np.isfinite(ridge_towards(old, few.T @ few, few.T @ y[:4], 1e-6)).all()
    assert ridge_towards(old, np.zeros((6, 6)), np.zeros((6, 3)), 1e-6) is old


def test_products_give_the_relative_error() -> None:
    x, weight = torch.randn(30, 6, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    y = torch.randn(30, 2, dtype=torch.float64)
    products = Products.zeros(6, 2, x.device)
    for part in range(0, 30, 10):
        products.add(x[part : part + 10], y[part : part + 10])
    expected = (y - x @ weight.flatten(1).T).square().sum() / y.square().sum()
    assert products.error(weight) == pytest.approx(float(expected))
    assert products.count == 30


# ---- networks -------------------------------------------------------------------------------------------


def test_planted_redundant_channels_are_found_and_made_up_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = model[0].weight[1], model[0].bias[1]  # a duplicate, read half as much
        model[2].weight[:, 5] = model[2].weight[:, 1] / 2
        model[0].weight[3], model[0].bias[3] = 0, -1.0  # zero behind ReLU
        model[2].weight[:, 6] = 0  # nobody reads it
    pruner, data = regression(widths={"0": 5}), batches(size=8, dtype=torch.float64)
    target = pruner.target(model, torch.zeros(1, 3, 8, 8))
    result = pruner.prune(model, target, data=data, generator=generator())
    _, drop = pruner.reconstruct(model, target, pruner.sampled(data, target), generator=generator())
    assert drop in ({"0": [1, 3, 6]}, {"0": [3, 5, 6]})
    with torch.no_grad():
        assert (result.model(data[0][0]) - model(data[0][0])).abs().max() < 1e-4


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).double()


def test_with_an_intercept_the_bias_takes_over_what_is_constant() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 3.0  # the same everywhere, and it matters
        model[2].weight[:, 2] = 1.0
        model[0].weight[5], model[0].bias[5] = 0, -1.0
    images = batches(size=8, dtype=torch.float64)

    def error(**options: Any) -> float:
        pruned = prune(model, "regression", example=torch.zeros(1, 3, 8, 8), data=images, widths={"0": 6}, **options)
        with torch.no_grad():
            return float((pruned.model(images[0][0]) - model(images[0][0])).abs().max())

    assert error(intercept=True) < 1e-6
    # Without, the LASSO keeps the constant channel, and another one is missed.
    assert error() > 1e-3


def test_with_an_intercept_the_fit_is_ordinary_linear_regression() -> None:
    model, data = two_layers(), batches(40, size=8, dtype=torch.float64)
    pruner = regression(widths={"0": 5}, intercept=True, positions_per_image=100, ridge=1e-10)
    target = pruner.target(model, torch.zeros(1, 3, 8, 8))
    full, drop = pruner.reconstruct(model, target, pruner.sampled(data, target), generator=generator())
    kept = sorted(set(range(8)) - set(drop["0"]))
    images = torch.cat([part for part, _ in data])
    with torch.no_grad():
        hidden = model[1](model[0](images))
        # Every position once: 16 an image.
        x = nn.functional.unfold(hidden[:, kept], 3).movedim(1, -1).flatten(0, 1)
        y = model[2](hidden).movedim(1, -1).flatten(0, 2)
    fitted = LinearRegression().fit(x.numpy(), y.numpy())
    weight, bias = full.get_parameter("2.weight")[:, kept].flatten(1), full.get_parameter("2.bias")
    assert torch.allclose(weight, torch.from_numpy(fitted.coef_), atol=1e-5)
    assert torch.allclose(bias, torch.from_numpy(fitted.intercept_), atol=1e-5)
    # So is the selection: scikit-learn's path for one list of all outputs, with its one intercept.
    with torch.no_grad():
        contributions = [nn.functional.conv2d(hidden[:, [c]], model[2].weight[:, [c]]) for c in range(8)]
        z = torch.stack([part.movedim(1, -1).flatten() for part in contributions], 1).numpy()
        outputs = model[2](hidden) - model[2].bias.view(1, -1, 1, 1)
        listed = outputs.movedim(1, -1).flatten().numpy()
    centred = z - z.mean(0), listed - listed.mean()
    assert kept == select_by_lasso(centred[0].T @ centred[0], centred[0].T @ centred[1], 5)


def test_an_intercept_needs_a_bias() -> None:
    with pytest.raises(UserError, match=r"pruner\.intercept=true: of the layers to fit in resnet20, none has a bias"):
        regression(ratio=0.5, intercept=True).target(build_model("resnet20"), EXAMPLE, "resnet20")


def test_the_publications_sample_size_is_the_default_and_a_smaller_one_is_said() -> None:
    def warnings(**options: Any) -> tuple[str, ...]:
        example = torch.zeros(1, 3, 8, 8)
        return prune(
            two_layers(), "regression", example=example, data=batches(size=8), ratio=0.5, **options
        ).report.warnings

    assert regression(ratio=0.5).images == 5000
    assert warnings() == ("pruner.images: regression sampled all 40 training images; its publication sampled 5,000",)
    assert warnings(images=40) == warnings(images=30) == ()


@pytest.mark.parametrize("network", ["vgg11", pytest.param("resnet20", marks=pytest.mark.slow), "preresnet20"])
def test_the_pruned_network_is_the_reconstructed_one_with_channels_masked(
    network: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(network)
    if network == "vgg11":  # narrower, and so quicker
        target = regression(ratio=0.9375).target(model, EXAMPLE)
        model = target.cut(model, Choice({group.name: range(group.size * 15 // 16) for group in target.groups})).model
    model = randomised_norms(model)
    data = batches(32 if network == "vgg11" else 12, dtype=torch.float64)
    pruner = regression(ratio=0.5, positions_per_image=25)
    target = pruner.target(model, EXAMPLE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        full, drop = pruner.reconstruct(model, target, pruner.sampled(data, target), generator=generator())
    errors = re.findall(r"error ([\d.]+) after removal, ([\d.]+) after reconstruction", caplog.text)
    assert len(errors) >= len(drop) == len(target.groups)
    assert all(float(reconstructed) <= float(removed) for removed, reconstructed in errors)

    pruned = pruner.prune(model, target, data=data, generator=generator()).model
    with torch.no_grad():
        expected = mask(full, target.channels, drop)(data[0][0])
        assert (pruned(data[0][0]) - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Residual(nn.Module):
    """One block whose branch is redundant enough to make up for what goes wrong on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 1)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.stem(x).relu())
        return self.fc((x + self.bn(self.conv2(self.conv1(x).relu()))).relu().mean((2, 3)))


def test_a_branch_makes_up_for_the_error_of_its_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = randomised_norms(Residual()), batches(64, 16, torch.float64)
    pruner = regression(widths={"stem": 4, "conv1": 60}, positions_per_image=60)
    target = pruner.target(model, torch.zeros(1, 3, 16, 16))
    assert [group.name for group in target.groups] == ["stem", "conv1.selected", "conv1"]

    def sum_error() -> torch.Tensor:
        full, drop = pruner.reconstruct(model, target, pruner.sampled(data, target), generator=generator())
        pruned = target.cut(full, Choice(drop)).model
        read: list[torch.Tensor] = []
        for network in (model, pruned):
            handle = network.get_submodule("fc").register_forward_pre_hook(lambda _, args: read.append(args[0]))
            with torch.no_grad():
                network(data[0][0])
            handle.remove()
        return (read[0] - read[1]).norm()

    compensated = sum_error()
    monkeypatch.setattr(WorkingCopy, "shortcut", lambda *_: None)
    assert compensated < 0.9 * sum_error()


def test_a_value_per_image_that_is_added_is_no_shortcut() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.shift = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(x).relu()) + self.shift(x.mean((2, 3), keepdim=True))
            return self.fc(y.relu().mean((2, 3)))

    torch.manual_seed(0)
    model, data = Shifted().double(), batches(size=8, dtype=torch.float64)
    pruner = regression(widths={"first": 7})
    result = pruner.prune(model, pruner.target(model, torch.zeros(1, 3, 8, 8)), data=data, generator=generator())
    with torch.no_grad():
        assert (result.model(data[0][0]) - model(data[0][0])).norm() < 0.2 * model(data[0][0]).norm()


def test_channels_that_a_norm_hardly_scales_do_not_make_up_for_a_shortcut() -> None:
    model = Residual().double().eval()
    with torch.no_grad():
        model.bn.weight[:4] = torch.tensor([0.0, 1e-4, 0.5, 2.0])
    current = WorkingCopy(model, torch.device("cpu"))
    shortcut = current.shortcut("conv2")
    assert shortcut is not None
    gain = current.gain(shortcut, 8)
    assert torch.allclose(gain[:4], torch.tensor([0, 0, 2, 0.5], dtype=torch.float64), rtol=1e-4)


def test_the_same_seed_gives_the_same_network() -> None:
    model, data = build_model("resnet20"), batches()
    pruner = regression(ratio={"layer3.2.*": 0.5}, images=20)
    target = pruner.target(model, EXAMPLE)
    first, second, other = (
        pruner.prune(model, target, data=data, generator=generator(seed)).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(first[name].shape == other[name].shape and not torch.equal(first[name], other[name]) for name in first)


def test_published_variants_need_no_data() -> None:
    with torch.device("meta"):
        vgg, resnet = torchvision.models.vgg16(), torchvision.models.resnet50()
    example = torch.zeros(1, 3, 224, 224)
    target = regression(variant="5x").target(vgg, example, "torchvision.models:vgg16")
    kept = [layer.kept for layer in target.report().layers]
    assert kept == [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512]

    target = regression(variant="2x").target(resnet, example, "torchvision.models:resnet50")
    kept = [layer.kept for layer in target.report().layers]
    assert len(kept) == 48
    assert kept[:6] == [35, 64, 55, 101, 51, 39]
    assert kept[-3:] == [1147, 512, 440]
    assert target.known
    assert len(target.architecture().selections["layer4.2.conv1"]) == 1147


def test_too_few_images_are_refused_before_and_while_pruning() -> None:
    model = build_model("vgg11")
    pruner = regression(ratio=0.5, positions_per_image=7)
    target = pruner.target(model, EXAMPLE)
    pruner.check_images(target, 512)
    message = (
        r"511 images \(pruner.images=5000\) give 511 positions, too few for the 512 channels of features.25; raise"
    )
    with pytest.raises(UserError, match=message):  # a linear layer has one position
        pruner.check_images(target, 511)
    with pytest.raises(UserError, match=r"raise pruner\.images, or"):
        regression(ratio=0.5, images=10).check_images(target, 1000)
    with pytest.raises(UserError, match="give 56 positions, too few for the 64 channels of features"):
        pruner.prune(model, target, data=batches(8), generator=generator())


def test_activations_that_are_not_finite_are_refused_by_layer() -> None:
    model = build_model("resnet20")
    data = batches()
    data[0][0][0] = float("inf")
    pruner = regression(ratio=0.5)
    with pytest.raises(UserError, match=r"layer1\.0\.conv\d: its weights or what it reads are not finite"):
        pruner.prune(model, pruner.target(model, EXAMPLE), data=data, generator=generator())


@pytest.mark.parametrize("options", [{"ranking": "global"}, {"ridge": 0}, {"images": 0}])
def test_wrong_options(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        regression(ratio=0.5, **options)


@pytest.mark.parametrize("positions", [20, 37, 60])
def test_few_positions_are_not_fitted_to_the_last(positions: int) -> None:
    """With about as many positions as features, a free fit is far worse on other data than no fit at all."""
    torch.manual_seed(0)
    x, true = torch.randn(positions + 500, 36, dtype=torch.float64), torch.randn(36, 8, dtype=torch.float64)
    y = x @ true + 2 * torch.randn(len(x), 8, dtype=torch.float64)
    old = (true + 0.3 * torch.randn(36, 8, dtype=torch.float64)).numpy()
    fit, held_out, other = (Products.zeros(36, 8, x.device) for _ in range(3))
    ridge_chosen_by = torch.arange(positions) % 5 == 4
    fit.add(x[:positions][~ridge_chosen_by], y[:positions][~ridge_chosen_by])
    held_out.add(x[:positions][ridge_chosen_by], y[:positions][ridge_chosen_by])
    other.add(x[positions:], y[positions:])

    def error(ridge: float) -> float:
        whole = fit + held_out
        fitted = ridge_towards(old, whole.xx.numpy().copy(), whole.xy.numpy(), ridge)
        return other.error(torch.from_numpy(fitted.T.copy()))

    chosen = best_ridge(old, fit, held_out)
    assert error(chosen) < 1.1 * other.error(torch.from_numpy(old.T.copy()))
    if positions == 37:
        assert error(1e-6) > 2 * error(chosen)


def test_a_layer_whose_products_do_not_fit_is_refused_before_any_training() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11(num_classes=10)
    pruner = regression(ratio=0.5)
    target = pruner.target(model, torch.zeros(1, 3, 224, 224))
    with pytest.raises(
        UserError, match=r"classifier\.0 reads 25,088 numbers for .* features\.18, .*skip=\[features\.18\]"
    ):
        pruner.check_images(target, 10**6)
