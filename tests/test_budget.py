"""Lengths of the arms: the published ones, and the rules behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import configure
from rethink_prune.budget import Budget, milestones_for, scratch_b_epochs
from rethink_prune.config import BudgetConfig
from rethink_prune.study import run_study
from rethink_prune.training.interrupts import Interrupts

# Parameters and Scratch-B of every CIFAR row of the L1 table, re-counted from the published architectures.
PUBLISHED = {
    "l1_vgg16_cifar10": (14987722, 5397034, 243, [121, 182]),
    "l1_resnet56_a_cifar10": (853018, 773336, 178, [89, 133]),
    "l1_resnet56_b_cifar10": (853018, 735712, 220, [110, 165]),
    "l1_resnet110_a_cifar10": (1727962, 1688522, 190, [95, 142]),
    "l1_resnet110_b_cifar10": (1727962, 1168424, 260, [130, 195]),
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_rows_are_planned_exactly(experiment: str, tmp_path: Path) -> None:
    config = configure(f"experiment={experiment}", "dry_run=true", f"store.root={tmp_path / 'store'}")
    with Interrupts() as interrupts:
        run_study(config, tmp_path, interrupts)
    plan = json.loads((tmp_path / "plan.json").read_text())

    full, params, scratch_b, milestones = PUBLISHED[experiment]
    assert plan["large"]["params"] == full
    assert plan["large"]["epochs"] == plan["arms"]["scratch_e"]["epochs"] == 160
    assert plan["arms"]["scratch_e"]["milestones"] == [80, 120]
    assert plan["pruned"]["params"] == params
    assert plan["arms"]["finetune"]["epochs"] == 40
    assert plan["arms"]["finetune"]["milestones"] == []
    assert plan["arms"]["scratch_b"]["epochs"] == scratch_b
    assert plan["arms"]["scratch_b"]["milestones"] == milestones
    assert plan["arms"]["scratch_b"]["train_flops"] == 6 * plan["pruned"]["macs"] * 50_000 * scratch_b
    assert not (tmp_path / "store").exists(), "a dry run writes its plan and nothing else"


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


def test_milestones_as_epochs_and_as_fractions_scale_alike() -> None:
    assert milestones_for([0.5, 0.75], 260, 160) == milestones_for([80, 120], 260, 160) == (130, 195)


def test_a_milestone_before_the_first_epoch_is_left_out() -> None:
    assert milestones_for([0.5, 0.75], 1, 1) == ()
    assert milestones_for([0.5, 0.75], 2, 2) == (1, 1)


def test_budget_rules_reach_the_arms() -> None:
    recipe = configure("recipe=paper").recipe
    stricter = Budget(recipe, BudgetConfig(name="x", add_finetune_epochs=True), 200, 100)
    assert stricter.training("scratch_b").epochs == 320 + 40
    other_base = Budget(recipe, BudgetConfig(name="x", base_epochs=200), 200, 100)
    assert other_base.training("scratch_b").epochs == 400
    assert other_base.training("large").epochs == 160
