"""Arms with a teacher: what they need, what they cost, what their stages depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import SMALL, configure, plan_of
from rethink_prune.errors import UserError
from rethink_prune.study.keys import add_keys
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.prepare import prepare_study

Run = Callable[..., dict[str, Any]]


def planned(*overrides: str) -> dict[str, StageSpec]:
    study = prepare_study(configure(*SMALL, *overrides))
    return {spec.title: spec for spec in add_keys(study.plan(), study.parts, {})}


def test_a_teacher_is_trained_where_nothing_else_needs_it() -> None:
    assert list(planned("arms=[scratch_kd@2]")) == ["large", "scratch_kd@2"]
    assert list(planned("arms=[scratch@2]")) == ["scratch@2"]
    assert list(planned("arms=[finetune_kd]")) == ["large", "prune", "finetune_kd"]
    plan = plan_of(configure(*SMALL, "arms=[scratch_kd@2]"))
    assert plan["large"]["trained"]


def test_keys_hold_the_teacher_where_there_is_one() -> None:
    arms = "arms=[scratch@2,scratch_kd@2,finetune,finetune_kd]"
    usual, hot = planned(arms), planned(arms, "recipe.distillation.temperature=8")
    for name in ("large", "prune", "scratch@2", "finetune"):
        assert usual[name].key == hot[name].key
    for name in ("scratch_kd@2", "finetune_kd"):
        (key, other) = (plan[name].key for plan in (usual, hot))
        assert key is not None
        assert other is not None
        assert key["teacher"]["stage"].startswith("large-")
        assert {name for name in key if key[name] != other[name]} == {"teacher"}


def test_a_teachers_forward_pass_and_training_count(small_study: Run) -> None:
    summary = small_study("arms=[scratch@1,scratch_kd@1,finetune,finetune_kd,scratch_kd@total:1]")
    arms, large = summary["arms"], summary["large"]
    lessons = 2 * large["macs"] * 200
    for plain, taught in (("scratch@1", "scratch_kd@1"), ("finetune", "finetune_kd")):
        assert arms[taught]["train_flops"] == arms[plain]["train_flops"] + lessons
    assert arms["scratch_kd@1"]["train_flops_total"] == arms["scratch_kd@1"]["train_flops"] + large["train_flops"]
    # The unpruned network is an ancestor of fine-tuning twice, as what was pruned and as the teacher.
    assert arms["finetune_kd"]["train_flops_total"] == arms["finetune_kd"]["train_flops"] + large["train_flops"]
    # Retraining with a teacher needs the same unpruned network: the lengths are equal.
    assert arms["scratch_kd@total:1"]["stage"] == arms["scratch_kd@1"]["stage"]
    plan = plan_of(configure(*SMALL, "arms=[scratch_kd@1]"))
    assert plan["arms"]["scratch_kd@1"]["train_flops"] == arms["scratch_kd@1"]["train_flops"]


def test_a_pruners_own_training_and_the_teachers_both_count(small_study: Run) -> None:
    summary = small_study("pruner=slimming", "dataset.train_limit=80", "arms=[retrain_kd@1,scratch_kd@total:1]")
    retrained, scratch = summary["arms"].values()
    bases = [summary[name]["train_flops"] for name in ("large", "sparse")]
    assert retrained["train_flops_total"] == retrained["train_flops"] + sum(bases)
    assert 0 <= retrained["train_flops_total"] - scratch["train_flops_total"] < retrained["train_flops"]
    assert scratch["train_flops_with_search"] == scratch["train_flops"] + sum(bases)


def test_given_weights_can_teach(small_study: Run) -> None:
    stage = small_study("arms=[finetune]")["large"]["stage"]
    summary = small_study("arms=[scratch_kd@1]", f"large.checkpoint={stage}")
    assert summary["large"]["top1"] is not None
    config = yaml.safe_load((Path(summary["arms"]["scratch_kd@1"]["stage"]) / "config.yaml").read_text())
    assert config["key"]["teacher"]["stage"] == Path(summary["large"]["stage"]).name


def test_without_its_teacher_an_arm_fails_and_says_why(small_study: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scratch_kd@1 failed: large failed, so there is no network to learn from"):
        small_study("arms=[scratch_kd@1,scratch@1]", "recipe.lr=1e30")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("weight=0", "recipe.distillation.weight=0: must be greater than 0"),
        ("weight=1.5", "recipe.distillation.weight=1.5: must be less than or equal to 1"),
        ("temperature=0", "recipe.distillation.temperature=0: must be greater than 0"),
    ],
)
def test_options_of_distillation_are_checked(option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(f"recipe.distillation.{option}")
