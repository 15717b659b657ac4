"""Studies whose training images are mixed and augmented by drawn operations: what their stages depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import SMALL, configure
from rethink_prune.store.metrics import read_metrics
from rethink_prune.study.keys import add_keys
from rethink_prune.study.prepare import prepare_study

Run = Callable[..., dict[str, Any]]
MIXED = ("recipe.mixup=0.8", "recipe.cutmix=1", "recipe.rand_augment=5")


def keys(*overrides: str) -> dict[str, Any]:
    study = prepare_study(configure(*SMALL, *overrides))
    return {spec.title: spec.key for spec in add_keys(study.plan(), study.parts, {})}


def differing(key: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Return the names of the values that differ, the inner ones of mappings."""
    found = set()
    for name in key.keys() | other.keys():
        mine, its = key.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(its, dict):
            found |= {f"{name}.{inner}" for inner in differing(mine, its)}
        elif mine != its:
            found.add(name)
    return found


def test_keys_hold_what_is_used_where_it_is_used() -> None:
    arms = ("pruner=snip", "pruner.images=40", "arms=[scratch_e]")
    plain = keys(*arms)
    mixed = keys(*arms, "recipe.mixup=0.8", "recipe.cutmix=1")
    augmented = keys(*arms, "recipe.rand_augment=5")
    assert plain == keys(*arms, "recipe.mixup=0", "recipe.rand_augment=0")
    # Pruners see images that are not mixed, but augmented.
    assert plain["prune"] == mixed["prune"]
    assert differing(plain["prune"], augmented["prune"]) == {"pruner.images.rand_augment"}
    arms = ("arms=[scratch_e]", "large.baseline=true")
    plain = keys(*arms)
    for title in ("large", "scratch_e"):
        found = differing(plain[title], keys(*arms, *MIXED)[title])
        assert found == {"training.mixup", "training.cutmix", "data.rand_augment"}


def test_every_arm_trains_on_the_same_mixed_images(small_study: Run, tmp_path: Path) -> None:
    arms = "arms=[finetune,scratch_e,scratch_kd@2]"
    summary = small_study(*MIXED, arms, "recipe.label_smoothing=0.1")
    plain = small_study(arms, "recipe.label_smoothing=0.1")
    for title in ("finetune", "scratch_e", "scratch_kd@2"):
        row, other = (read_metrics(Path(study["arms"][title]["stage"]))[-1] for study in (summary, plain))
        assert row["train_loss"] != other["train_loss"]
        assert 0 <= row["train_top1"] <= 100
    # Trainings at once do not disturb each other's draws.
    at_once = small_study(*MIXED, arms, "recipe.label_smoothing=0.1", "together=3", f"store.root={tmp_path / 'other'}")
    for title, arm in summary["arms"].items():
        weights = [Path(study["stage"]) / "model.safetensors" for study in (arm, at_once["arms"][title])]
        assert weights[0].read_bytes() == weights[1].read_bytes(), title


@pytest.mark.parametrize("recipe", ["vit", "vit_digits"])
def test_the_recipe_is_that_of_its_comment(recipe: str) -> None:
    found = configure(f"recipe={recipe}", "dataset=digits").recipe
    assert (found.optimizer, found.weight_decay, found.decay_norms, found.label_smoothing) == (
        "adamw",
        0.05,
        False,
        0.1,
    )
    assert (found.schedule, found.finetune.schedule) == ("cosine", "cosine")
    assert found.finetune.lr < found.lr
    assert (found.mixup > 0, found.cutmix > 0) == ((recipe == "vit"),) * 2
    assert found.rand_augment > 0
