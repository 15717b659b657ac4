"""Arms with a length: how names are read, what they train, and that one training has one stage under all its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import SMALL, configure, plan_of
from rethink_prune.config import BudgetConfig, Phase, RecipeConfig
from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.study.arms import arm_of
from rethink_prune.study.budget import Budget
from rethink_prune.study.keys import add_keys
from rethink_prune.study.plan import plan_arms
from rethink_prune.study.prepare import prepare_study
from rethink_prune.study.tables import plan_text, study_rows, study_table
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.schedule import OptimizerSpec

Run = Callable[..., dict[str, Any]]
LARGE, PRUNED = Cost(80, 900), Cost(40, 400)


def budget(rule: dict[str, Any] | None = None, **options: Any) -> Budget:
    phase = {"epochs": 12, "lr": 0.1, "milestones": (0.5, 0.75), **options}
    recipe = RecipeConfig(name="x", finetune=Phase(epochs=3, lr=0.01), **phase)
    return Budget(recipe, BudgetConfig(name="x", **(rule or {})), LARGE, macs_reference=900, train_images=100)


def trainings(lengths: list[str], pruned: Cost | None = PRUNED, **options: Any) -> list[OptimizerSpec | None]:
    return [spec.optimizer for spec in plan_arms(budget(**options), lengths, Architecture(), pruned)]


def epochs(*arms: str, **options: Any) -> list[int | None]:
    return [training and training.epochs for training in trainings([*arms], **options)]


def test_lengths_are_epochs_shares_and_rules() -> None:
    assert epochs("retrain@7", "retrain@0.25x", "retrain@2x", "retrain@e", "retrain@b") == [7, 3, 24, 12, 27]
    # 0.29 * 100 is 28.99... in floating point.
    assert epochs("scratch@0.29x", **{"epochs": 100}) == [29]
    assert epochs("scratch@0.3x") == [3], "rounded down"


def test_a_total_is_what_retraining_and_its_ancestors_cost() -> None:
    for arm, retrained in (("total:4", 4), ("total:0.5x", 6), ("total:e", 12), ("total:finetune", 3)):
        (found,) = epochs(f"scratch@{arm}")
        assert found is not None
        total = 12 * LARGE.macs + retrained * PRUNED.macs
        assert found * PRUNED.macs <= total < (found + 1) * PRUNED.macs
    # Whatever Scratch-B's rule says.
    capped = {"cap": 1.0, "base_epochs": 3, "add_finetune_epochs": True}
    assert epochs("scratch@total:4", rule=capped) == [31]


def test_what_follows_from_the_pruned_network_waits_for_it() -> None:
    arms = ("retrain@4", "scratch@0.5x", "scratch@b", "scratch@total:4")
    assert epochs(*arms, pruned=None) == [4, 6, None, None]


def test_retraining_and_scratch_differ_in_their_start_alone() -> None:
    options = {"warmup": 3, "nesterov": True, "weight_decay": 0.01, "label_smoothing": 0.1}
    for length in ("4", "0.5x", "e", "b", "1"):
        inherited, fresh = plan_arms(budget(**options), [f"retrain@{length}", f"scratch@{length}"], None, PRUNED)
        assert inherited.optimizer == fresh.optimizer is not None
        assert (inherited.parent, fresh.parent) == ("prune", None)
        assert inherited.optimizer.lr == 0.1, "the large network's, not that of fine-tuning"


def test_schedules_have_the_shape_of_the_recipe() -> None:
    (training,) = trainings(["retrain@8"])
    assert training is not None
    assert (training.milestones, training.gammas) == ((4, 6), (0.1, 0.1))
    (training,) = trainings(["retrain@8"], schedule="step", step=3, milestones=())
    assert training is not None
    assert training.milestones == (2, 4, 6)


def warmups(*arms: str, **options: Any) -> list[int | None]:
    return [training and training.warmup for training in trainings([*arms], **options)]


def test_a_warm_up_scales_and_is_never_refused() -> None:
    arms = ("scratch@1", "scratch@2", "scratch@4", "scratch@8", "scratch@24", "scratch@e")
    assert warmups(*arms, warmup=4) == [0, 0, 1, 2, 8, 4]
    # Scaled, the warm-up of five of twelve epochs would end where the learning rate falls.
    assert warmups("scratch@2", "scratch@3", "scratch@7", warmup=5, milestones=(6,)) == [0, 0, 2]
    # Scratch-B keeps the one it has always had.
    assert warmups("scratch_b", "retrain@b", warmup=4) == [4, 4]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("retrain@0", "retrain@0: 0 epochs: must be from 1 to"),
        ("retrain@-1", "retrain@-1: -1 is no length; a length is an epoch count (12), a share"),
        ("scratch@many", "scratch@many: many is no length"),
        ("scratch@1.5", "scratch@1.5: 1.5 is no length"),
        ("scratch@٣", "is no length"),
        ("scratch@0x", "scratch@0x: 0x: must be above 0"),
        ("scratch@total:", "scratch@total:: nothing is no length"),
        ("scratch@total:many", "scratch@total:many: many is no length"),
        ("scratch@total:total:2", "total:2 is no length"),
        ("scratch@finetune", "finetune is no length"),
        ("retrain@total:4", "retrain@total:4: total: is for scratch arms, which it gives"),
        ("retrain", "retrain: needs a length: retrain@N"),
        ("finetune@3", "finetune@3: the length of finetune is given; leave out @3, or take retrain@N"),
        ("retrian@4", "no arm retrian@4; did you mean retrain@N"),
        ("winning", "no arm winning; known are finetune, scratch_e, scratch_b, large_longer, retrain@N, scratch@N"),
    ],
)
def test_what_is_no_arm_is_said_in_one_line(arm: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(f"arms=[finetune,'{arm}']")
    assert str(error.value).startswith(f"arms=[finetune, {arm}]: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arm", ["retrain@0.05x", "scratch@total:0.05x"])
def test_a_share_that_gives_no_epoch_is_refused_before_anything_is_trained(arm: str) -> None:
    with pytest.raises(UserError, match=rf"^arms: {arm}: 0\.05x is less than one of the 12 epochs of recipe\.epochs"):
        plan_of(configure(f"arms=[{arm}]"))


def test_every_wrong_arm_is_named() -> None:
    with pytest.raises(UserError) as error:
        configure("arms=[retrain@0,finetun]", "seed=-1")
    wrong = "arms=[retrain@0, finetun]"
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [wrong, wrong, "seed=-1"]


def test_one_training_has_one_stage_under_all_its_names(small_study: Run, tmp_path: Path) -> None:
    arms = "arms=[scratch_e,finetune,scratch@e,scratch@2,scratch@1x,scratch_b,scratch@b]"
    summary = small_study(arms)
    stages = {name: entry["stage"] for name, entry in summary["arms"].items()}
    assert stages["scratch_e"] == stages["scratch@e"] == stages["scratch@2"] == stages["scratch@1x"]
    assert stages["scratch_b"] == stages["scratch@b"] != stages["scratch_e"]
    assert len(list((tmp_path / "store/stages").glob("scratch-*"))) == 2
    names = [row[0] for row in study_rows(summary)]
    assert names[-3:] == ["scratch_e, scratch@e, scratch@2, scratch@1x", "finetune", "scratch_b, scratch@b"]
    plan = plan_of(configure(*SMALL, arms))
    assert plan["arms"]["scratch@2"]["same_as"] == "scratch_e"
    assert "| scratch_b, scratch@b " in plan_text(plan)


def test_spellings_are_in_no_key() -> None:
    study = prepare_study(configure(*SMALL, "arms=[scratch_e,scratch_b,scratch@total:1,retrain@2]"))
    other = prepare_study(configure(*SMALL, "arms=[scratch@2,scratch@b,scratch@total:0.5x,retrain@e]"))

    def keys(made: Any) -> list[Any]:
        return [spec.key for spec in add_keys(made.plan(), made.parts, {}) if spec.kind in ("scratch", "finetune")]

    assert keys(study) == keys(other)
    assert None not in keys(study)


def test_what_a_total_may_cost_is_what_retraining_costs(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[retrain@1,scratch@total:1,scratch@1]", "pruner.ratio=0.3")
    retrained, total, equal = (summary["arms"][name] for name in ("retrain@1", "scratch@total:1", "scratch@1"))
    assert retrained["train_flops"] == equal["train_flops"] == equal["train_flops_total"]
    plan = plan_of(configure(*SMALL, "arms=[retrain@1,scratch@total:1,scratch@1]", "pruner.ratio=0.3"))
    for name, entry in summary["arms"].items():
        for flops in ("train_flops", "train_flops_total"):
            assert plan["arms"][name][flops] == entry[flops]
    assert retrained["train_flops_total"] == summary["large"]["train_flops"] + retrained["train_flops"]
    left = retrained["train_flops_total"] - total["train_flops_total"]
    assert 0 <= left < equal["train_flops"], "another epoch does not fit"
    assert (tmp_path / "run1/tensorboard/scratch@total-1").is_dir()
    assert json.loads((tmp_path / "run1/summary.json").read_text())["study"]["arms"][1] == "scratch@total:1"
    assert "| scratch@total:1 " in study_table(summary)


def test_a_pruner_that_trains_its_own_way_counts_once_in_a_total(small_study: Run) -> None:
    arms = "arms=[retrain@1,scratch@total:1]"
    summary = small_study(arms, "pruner=slimming", "dataset.train_limit=80")
    retrained, total = (summary["arms"][name] for name in ("retrain@1", "scratch@total:1"))
    assert retrained["train_flops_total"] == summary["sparse"]["train_flops"] + retrained["train_flops"]
    assert 0 <= retrained["train_flops_total"] - total["train_flops"] < retrained["train_flops"]
    assert total["train_flops_with_search"] == total["train_flops"] + summary["sparse"]["train_flops"]


def test_titles_and_names_say_the_length() -> None:
    arm = arm_of("scratch@total:4")
    assert arm.title == "from scratch @total:4"
    assert arm.name == "training from scratch for the total computation of retraining for 4 epochs"
    assert arm_of("retrain@1").name == "retraining for 1 epoch"
    assert arm_of("retrain@1").style == arm_of("retrain@2").style
