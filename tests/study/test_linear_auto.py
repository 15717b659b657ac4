"""Fine-tuning whose learning rate falls linearly from a start that follows from what pruning removed."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from harness import SMALL, configure
from rethink_prune.errors import UserError
from rethink_prune.store.metrics import read_metrics
from rethink_prune.study.keys import add_keys
from rethink_prune.study.prepare import prepare_study

Run = Callable[..., dict[str, Any]]
AUTO = ("recipe=linear_auto", "recipe.finetune.warmup=0", "dataset.train_limit=80")


def weights(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = safetensors.torch.load_file(Path(entry["stage"]) / "model.safetensors")
    return {name: tensor.double() for name, tensor in state.items() if name.endswith(("weight", "bias"))}


def formula(summary: dict[str, Any], *, least: float) -> float:
    """Return the published start, from the weights of the stages: p = 0.1."""
    before, after = weights(summary["large"]), weights(summary["pruned"])
    norms = [float(sum((tensor**2).sum() for tensor in state.values())) for state in (before, after)]
    counts = [sum(int((t != 0).sum()) for t in state.values() if t.ndim > 1) for state in (before, after)]
    start = 0.1 * sqrt(abs(norms[0] - norms[1]) / norms[0]) / sqrt(1 - counts[1] / counts[0])
    return min(0.1, max(0.1 * least, start))


@pytest.mark.parametrize("pruner", [("pruner=l1", "pruner.ratio=0.5"), ("pruner=magnitude", "pruner.ratio=0.6")])
def test_the_start_follows_from_what_pruning_removed(pruner: tuple[str, str], small_study: Run) -> None:
    summary = small_study(*AUTO, *pruner, "recipe.epochs=8", "recipe.finetune.epochs=2", "arms=[finetune]")
    finetune = summary["arms"]["finetune"]
    expected = formula(summary, least=0.25)
    assert 0.025 < expected < 0.1, "neither end of the range"
    assert finetune["lr_start"] == pytest.approx(expected, rel=1e-6)
    rates = [row["lr"] for row in read_metrics(Path(finetune["stage"]))]
    assert rates == pytest.approx([expected, expected / 2], rel=1e-5)


def test_a_longer_retraining_starts_no_lower_than_its_share_of_epochs(small_study: Run) -> None:
    summary = small_study(*AUTO, "recipe.epochs=2", "recipe.finetune.epochs=2", "arms=[finetune,retrain@1]")
    assert summary["arms"]["finetune"]["lr_start"] == 0.1, "as many epochs as the large network: its learning rate"
    assert "lr_start" not in summary["arms"]["retrain@1"]


def test_keys_hold_the_rule_and_what_the_parent_does_not() -> None:
    def key(*overrides: str) -> Any:
        study = prepare_study(configure(*SMALL, *AUTO, "arms=[finetune]", *overrides))
        return add_keys(study.plan(), study.parts, {})[-1].key

    training = key("recipe.epochs=8", "recipe.finetune.epochs=2")["training"]
    assert (training["lr"], training["schedule"], training["start"]) == (0.1, "linear", {"least": 0.25, "rule": "allr"})
    plain = key("recipe.finetune.lr=0.1")["training"]
    assert "start" not in plain
    assert plain["schedule"] == "linear"


def test_the_peak_is_the_highest_rate_of_the_recipe() -> None:
    raised = ("recipe.lr=0.01", "recipe.epochs=8", "recipe.milestones=[1,6]", "recipe.gamma=[10,0.2]")
    assert prepare_study(configure(*SMALL, *AUTO, *raised)).budget.peak_lr == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.lr=auto", "recipe.lr=auto: must be a number: auto is for recipe.finetune.lr, after pruning"),
        ("recipe.finetune.lr=auto", "recipe.finetune: lr=auto is the start of a linear schedule: it needs schedule"),
        ("recipe.finetune.lr=-1", "recipe.finetune.lr=-1: must be greater than 0"),
        ("recipe.finetune.lr=fast", "recipe.finetune.lr=fast: must be a valid number"),
    ],
)
def test_what_is_no_learning_rate_is_said_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(override)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
