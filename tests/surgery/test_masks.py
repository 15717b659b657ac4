"""Masks: what they hold at zero in training, and how masked networks are drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from rethink_prune import prune
from rethink_prune.data import EvalBatches, ImageArray, TrainBatches
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.normalization import Normalization
from rethink_prune.surgery.architecture import Architecture, Masks, apply_masks, draw_masked
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.hooks import HeldMasks, TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.training.train import Runtime, train

CPU = torch.device("cpu")
OPTIMIZERS = {
    "plain": {"optimizer": "sgd", "nesterov": False},
    "nesterov": {"optimizer": "sgd", "nesterov": True},
    "adamw": {"optimizer": "adamw", "nesterov": False, "lr": 0.01},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(1, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    """Mask every other entry of every parameter but one: of weights, biases, scales and shifts."""
    return {
        name: torch.arange(parameter.numel()).view(parameter.shape) % 2 == 0
        for name, parameter in model.named_parameters()
        if name != "6.weight"
    }


def assert_zero_bits(model: nn.Module, masks: Masks) -> None:
    for name, mask in masks.items():
        gone = model.get_parameter(name).detach().contiguous()[~mask]
        assert gone.numel() > 0
        assert not gone.view(torch.int32).any(), f"{name}: neither a value nor a sign may come back"


def train_masked(model: nn.Module, hooks: TrainingHooks, folder: Path, **changes: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (48, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images = ImageArray(pixels, torch.arange(48) % 4)
    normalize = Normalization((0.5,) * 3, (0.25,) * 3, image_size=pixels.shape[1], device=CPU)
    values = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "schedule": "multistep", "epochs": 3}
    train(
        model,
        TrainBatches(DeviceImages(images, normalize, pad=1, flip=True, seed=0), batch_size=16),
        {"test": EvalBatches(DeviceImages(images, normalize), batch_size=48)},
        OptimizerSpec(**{**values, "milestones": (2,), "gammas": (0.1,), **changes}),
        runtime=Runtime(CPU, "fp32"),
        hooks=hooks,
        seed=0,
        checkpoints=Checkpoints(folder),
        interrupts=Interrupts(),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_leaves_masked_weights_at_zero_and_moves_the_others(optimizer: str, tmp_path: Path) -> None:
    model = network()
    masks = half(model)
    hooks = HeldMasks(masks)
    hooks.prepare(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_masked(model, hooks, tmp_path, **OPTIMIZERS[optimizer])
    assert_zero_bits(model, masks)
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert (parameter != before[name])[mask].float().mean() > 0.9, name


def test_without_masks_held_the_same_training_moves_them(tmp_path: Path) -> None:
    model = network()
    masks = half(model)
    apply_masks(model, masks)
    train_masked(model, TrainingHooks(), tmp_path, **OPTIMIZERS["plain"])
    assert all(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("gradient", [1e30, -1e30, 1e-30, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["plain", "nesterov", "adamw"])
def test_no_gradient_moves_a_masked_weight(kind: str, gradient: float) -> None:
    model = network()
    masks = half(model)
    hooks = HeldMasks(masks)
    hooks.prepare(model)
    optimizer: Optimizer = (
        AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        if kind == "adamw"
        else SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=kind == "nesterov", weight_decay=0.5)
    )
    for sign in (1, -1, 1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, sign * gradient)
        hooks.before_step(model, 0.1)
        for name, mask in masks.items():
            held = model.get_parameter(name).grad
            assert held is not None
            assert (held[mask].isnan() | (held[mask] == sign * gradient)).all(), "what remains keeps its gradient"
        optimizer.step()
    assert_zero_bits(model, masks)


def test_parameters_without_gradient_are_passed_over() -> None:
    model = network()
    hooks = HeldMasks(half(model))
    model.get_parameter("0.weight").grad = torch.ones(8, 3, 3, 3)
    hooks.before_step(model, 0.1)
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert torch.equal(gradient.bool(), half(model)["0.weight"])
    assert model.get_parameter("3.weight").grad is None


def test_prepare_and_apply_zero_what_is_masked_and_nothing_else() -> None:
    model, masks = network(), half(network())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    HeldMasks(masks).prepare(model)
    for name, parameter in model.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(parameter, expected)


# ---- drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_masked_convolutions_are_drawn_at_a_density_scaled_fan_out(density: float) -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 32, 1))
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < density
        for name in ("0.weight", "1.weight")
    }
    torch.manual_seed(1)
    draw_masked(model, masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        drawn = weight[mask]
        std = math.sqrt(2 / (int(mask.sum()) / weight.shape[1]))
        assert not weight[~mask].any()
        assert drawn.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * len(drawn)))
        assert abs(drawn.mean().item()) < 4 * std / math.sqrt(len(drawn))
        if density == 1.0:
            fan_out = weight[:, 0].numel()
            assert std == pytest.approx(math.sqrt(2 / fan_out)), "nothing masked: Kaiming's fan-out"


def test_only_masked_convolutions_are_drawn_anew() -> None:
    model, masks = network(), half(network())
    del masks["3.weight"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    draw_masked(model, masks)
    for name, parameter in model.named_parameters():
        if name == "0.weight":
            assert not (parameter == before[name])[masks[name]].any()
        else:
            assert torch.equal(parameter, before[name] * masks.get(name, torch.ones(()))), name


def test_grouped_convolution_unmasked_has_the_fan_out_of_the_ungrouped() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3, groups=4))
    torch.manual_seed(0)
    draw_masked(model, {"0.weight": torch.ones(256, 64, 3, 3, dtype=torch.bool)})
    weight = model.get_parameter("0.weight").detach()
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)


def test_a_single_weight_left_is_finite() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    mask = torch.zeros(16, 16, 3, 3, dtype=torch.bool)
    mask[3, 4, 1, 2] = True
    draw_masked(model, {"0.weight": mask})
    weight = model.get_parameter("0.weight")
    assert torch.isfinite(weight).all()
    assert torch.equal(weight != 0, mask)


def test_convolution_of_another_dimension_is_drawn_too() -> None:
    model = nn.Sequential(nn.Conv1d(64, 128, 5))
    mask = torch.rand(128, 64, 5, generator=torch.Generator().manual_seed(1)) < 0.25
    torch.manual_seed(0)
    draw_masked(model, {"0.weight": mask})
    drawn = model.get_parameter("0.weight").detach()[mask]
    assert drawn.std().item() == pytest.approx(math.sqrt(2 / (len(drawn) / 64)), rel=0.05)


def test_saved_masks_draw_the_same_weights(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(11)], nn.Flatten())
    result = prune(model, "magnitude", example=torch.zeros(1, 3, 4, 4), ratio=0.5)
    assert list(result.architecture.masks)[2:] == [f"{i}.weight" for i in range(2, 11)], "as text, 10 is before 2"
    result.architecture.save(tmp_path)
    drawn = []
    for masks in (result.architecture.masks, Architecture.load(tmp_path).masks):
        torch.manual_seed(0)
        draw_masked(model, masks)
        drawn.append(model.get_parameter("10.weight").detach().clone())
    assert torch.equal(*drawn)
