"""Lengths of the arms: the published ones, and the rules behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import configure, plan_of
from rethink_prune.config import BudgetConfig, Phase, RecipeConfig
from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.study.budget import Budget, scratch_b_epochs, training_for
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts


def test_a_dry_run_writes_its_plan_and_nothing_else(tmp_path: Path) -> None:
    config = configure("experiment=l1_vgg16_cifar10", "dry_run=true", f"store.root={tmp_path / 'store'}")
    with Interrupts() as interrupts:
        run_study(config, tmp_path, interrupts)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["arms"]["finetune"]["milestones"] == []
    assert plan["arms"]["scratch_b"]["train_flops"] == 6 * plan["pruned"]["macs"] * 50_000 * 243
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_published_stage_widths_of_resnet56_b(tmp_path: Path) -> None:
    config = configure("experiment=l1_resnet56_b_cifar10", "dry_run=true")
    with Interrupts() as interrupts:
        plan = run_study(config, tmp_path, interrupts)
    widths = [layer["kept"] for layer in plan["pruned"]["layers"] if layer["layer"].startswith("layer")]
    assert widths == [*[6] * 7, 16, 16, 32, *[22] * 6, 32, 22, 64, *[57] * 7, 64]


def test_cap_and_finetuning_epochs() -> None:
    assert scratch_b_epochs(90, 300, 100) == 270
    assert scratch_b_epochs(90, 300, 100, cap=2) == 180
    assert scratch_b_epochs(90, 300, 200, cap=2) == 135
    assert scratch_b_epochs(90, 300, 100, cap=2, finetune_epochs=20) == 200


def test_scratch_b_is_not_lost_to_rounding_of_the_ratio() -> None:
    # 49 * (100 / 49) is 99.99... in floating point.
    assert scratch_b_epochs(49, 100, 49) == 100


def budget(recipe: RecipeConfig, macs_reference: int, **rule: Any) -> Budget:
    return Budget(recipe, BudgetConfig(name="x", **rule), Cost(1, 1), macs_reference, 100)


def phase(**options: Any) -> Phase:
    return Phase(epochs=160, lr=0.1, **options)


def test_milestones_as_epochs_and_as_fractions_scale_alike() -> None:
    fractions, epochs = phase(milestones=(0.5, 0.75)), phase(milestones=(80, 120))
    assert training_for(fractions, 260, 160) == training_for(epochs, 260, 160)
    assert training_for(fractions, 260, 160).milestones == (130, 195)


def test_a_milestone_before_the_first_epoch_is_left_out_with_its_gamma() -> None:
    assert training_for(phase(milestones=(0.5, 0.75)), 1, 1).milestones == ()
    assert training_for(phase(milestones=(0.5, 0.75)), 2, 2).milestones == (1, 1)
    short = training_for(phase(milestones=(1, 80), gamma=(10.0, 0.2)), 16, 160)
    assert (short.milestones, short.gammas) == ((8,), (0.2,))


@pytest.mark.parametrize(
    ("epochs", "base", "step", "milestones"),
    [
        # The published ImageNet trainings: 34-A, 34-B, capped, and those of Sparse Structure Selection.
        (106, 90, 30, (35, 70, 105)),
        (118, 90, 30, (39, 78, 117)),
        (180, 90, 30, (60, 120)),
        (117, 100, 30, (35, 70, 105)),
        (145, 100, 30, (43, 86, 129)),
        (179, 100, 30, (53, 106, 159)),
        (2, 90, 30, ()),
    ],
)
def test_steps_scale_to_whole_epochs(epochs: int, base: int, step: int, milestones: tuple[int, ...]) -> None:
    assert training_for(phase(schedule="step", step=step), epochs, base).milestones == milestones


def test_base_epochs_do_not_double_absolute_milestones() -> None:
    # Soft filter pruning, ResNet-56, 70 % kept by the reference's count: 551 epochs, drops at 82, 165, 220.
    recipe = configure("recipe=soft_filter").recipe
    training = budget(recipe, 13784, base_epochs=400).optimizer("scratch_b", Cost(1, 10000))
    assert training is not None
    assert (training.epochs, training.milestones) == (551, (1, 82, 165, 220))
    assert training.gammas == (10, 0.2, 0.2, 0.2)


def test_budget_rules_reach_the_arms() -> None:
    recipe = configure("recipe=paper").recipe
    half = Cost(1, 100)
    stricter, other_base = budget(recipe, 200, add_finetune_epochs=True), budget(recipe, 200, base_epochs=200)
    lengths = [stricter.optimizer("scratch_b", half), *map(other_base.optimizer, ("scratch_b", "large"), (half, half))]
    assert [length.epochs for length in lengths if length] == [320 + 40, 400, 160]
    assert stricter.optimizer("scratch_b", None) is None, "follows from a pruned network that is not known"


@pytest.mark.parametrize(("milestones", "fails"), [("[3,8]", True), ("[0.3,0.8]", True), ("[4,8]", False)])
def test_a_warm_up_that_swallows_the_peak_is_refused(milestones: str, fails: bool) -> None:
    arguments = ["recipe.epochs=10", "recipe.warmup=3", f"recipe.milestones={milestones}", "arms=[scratch_e]"]
    if not fails:
        assert plan_of(configure(*arguments))
        return
    with pytest.raises(UserError, match=r"recipe\.warmup=3: the learning rate would fall after epoch 3 of 10"):
        plan_of(configure(*arguments))
