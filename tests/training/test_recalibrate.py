"""Statistics of batch norms estimated anew: what they become, and that no weight changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rethink_prune import build_model
from rethink_prune.training.recalibrate import recalibrate
from rethink_prune.training.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), "fp32")
Study = Callable[..., dict[str, Any]]


def test_they_are_the_averages_over_all_full_batches_and_no_weight_changes() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = [(torch.randn(8, 3, 16, 16), torch.zeros(8)) for _ in range(3)]
    with torch.no_grad():
        inputs = [model.get_submodule("conv1")(images) for images, _ in batches]
    smaller = (100 * torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert recalibrate(model, [*batches, smaller], runtime=RUNTIME)
    norm: Any = model.get_submodule("bn1")
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0), rtol=1e-3)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_norms_that_a_network_keeps_frozen_are_estimated_and_dropout_is_not_active() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    model = Frozen(nn.Dropout(0.9), nn.BatchNorm2d(3))
    assert recalibrate(model, [(torch.full((4, 3, 2, 2), 5.0), torch.zeros(4))], runtime=RUNTIME)
    assert model.get_buffer("1.running_mean").tolist() == [5.0, 5.0, 5.0]


def test_without_running_statistics_there_is_nothing_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert not recalibrate(model, [], runtime=RUNTIME)


def test_a_study_reports_both_and_fine_tunes_from_either(small_study: Study) -> None:
    arguments = ("recipe.epochs=6", "dataset.train_limit=600", "arms=[finetune]")
    stale, fresh = (small_study(*arguments, f"pruner.recalibrate={value}") for value in ("false", "true"))
    for name in ("top1", "top1_recalibrated"):
        assert stale["pruned"][name] == fresh["pruned"][name], "what is measured does not depend on the option"
    assert stale["pruned"]["top1_recalibrated"] > stale["pruned"]["top1"] + 10
    norms = [load_file(Path(run["pruned"]["stage"]) / "model.safetensors") for run in (stale, fresh)]
    assert torch.equal(norms[0]["conv1.weight"], norms[1]["conv1.weight"])
    assert not torch.equal(norms[0]["layer1.0.bn1.running_var"], norms[1]["layer1.0.bn1.running_var"])
    assert stale["large"]["stage"] == fresh["large"]["stage"]
    assert stale["arms"]["finetune"]["stage"] != fresh["arms"]["finetune"]["stage"]


def test_it_is_the_same_for_every_pruner(small_study: Study) -> None:
    """Of both, the first layer is that of the unpruned network, so its statistics are equal."""
    stages = []
    for pruner in ("l1", "random"):
        widths = ("pruner.widths={layer3.2.conv1: 63}", "pruner.ratio=null")
        run = small_study(f"pruner={pruner}", *widths, "pruner.recalibrate=true", "arms=[finetune]")
        stages.append(load_file(Path(run["pruned"]["stage"]) / "model.safetensors"))
    assert torch.equal(stages[0]["bn1.running_var"], stages[1]["bn1.running_var"])


@pytest.mark.parametrize(("pruner", "searched"), [("l1", False), ("slimming", True)])
def test_what_an_arm_costs_with_the_search_for_its_widths(pruner: str, searched: bool, small_study: Study) -> None:
    run = small_study(f"pruner={pruner}", "arms=[finetune,scratch_e,large_longer]")
    arms, search = run["arms"], run["sparse"]["train_flops"] if searched else 0
    assert arms["finetune"]["train_flops_with_search"] == arms["finetune"]["train_flops_total"]
    assert arms["large_longer"]["train_flops_with_search"] == arms["large_longer"]["train_flops_total"]
    assert arms["scratch_e"]["train_flops_with_search"] == arms["scratch_e"]["train_flops_total"] + search
