"""The list of stages: what is planned is what runs, and an arm is one entry."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import SMALL, configure, plan_of
from rethink_prune.errors import Interrupted
from rethink_prune.models import build_model
from rethink_prune.study import networks, stages
from rethink_prune.study.arms import ARMS, Arm, Style
from rethink_prune.study.keys import add_keys
from rethink_prune.study.prepare import prepare_study

Run = Callable[..., dict[str, Any]]


def titles(*overrides: str) -> list[str]:
    return [spec.title for spec in prepare_study(configure(*SMALL, *overrides)).plan()]


def test_what_nothing_reads_is_not_planned() -> None:
    arms = "arms=[scratch_b,finetune]"
    assert titles(arms) == ["large", "prune", "scratch_b", "finetune"]
    assert titles("arms=[scratch_b]") == ["scratch_b"]
    assert titles("arms=[scratch_b]", "large.baseline=true") == ["large", "scratch_b"]
    assert titles("arms=[scratch_b]", "pruner=magnitude") == ["large", "prune", "scratch_b"]
    assert titles(arms, "pruner=slimming") == ["large", "sparse", "prune", "scratch_b", "finetune"]
    assert titles("arms=[scratch_e]", "pruner=soft_filter", "large.baseline=true") == ["large", "scratch_e"]


def test_a_stage_starts_from_the_one_it_names() -> None:
    for pruner, base in (("l1", "large"), ("slimming", "sparse")):
        plan = prepare_study(configure(*SMALL, f"pruner={pruner}")).plan()
        parents = {spec.title: spec.parent for spec in plan}
        assert parents["prune"] == base
        assert (parents["finetune"], parents["scratch_b"], parents["large"]) == ("prune", None, None)
        order = list(parents)
        assert all(parent is None or order.index(parent) < order.index(title) for title, parent in parents.items())


def test_keys_wait_for_what_they_depend_on() -> None:
    study = prepare_study(configure(*SMALL, "pruner=magnitude", "arms=[finetune,scratch_e,large_longer]"))
    keyed = {spec.title: spec.key is not None for spec in add_keys(study.plan(), study.parts, {})}
    assert keyed == {"large": True, "prune": True, "finetune": False, "scratch_e": False, "large_longer": False}


def test_the_plan_is_what_runs(small_study: Run) -> None:
    overrides = ("arms=[finetune,scratch_e,scratch_b,large_longer]", "pruner.ratio=0.6")
    plan, summary = plan_of(configure(*SMALL, *overrides)), small_study(*overrides)
    for name, planned in plan["arms"].items():
        done = summary["arms"][name]
        assert (planned["epochs"], planned["train_flops"]) == (done["epochs"], done["train_flops"])
    assert plan["large"]["train_flops"] == summary["large"]["train_flops"]


def test_an_arm_is_one_entry(small_study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning with Scratch-B's budget: nothing but the entry says so."""
    arm = Arm(
        "pruned", "inherited", "scratch_b", "fine-tuned longer", "longer fine-tuning", "", Style("#000000", "-", "x")
    )
    monkeypatch.setitem(ARMS, "finetune_b", arm)  # type: ignore[arg-type]
    summary = small_study("arms=[finetune_b,scratch_b]")
    longer, scratch = summary["arms"]["finetune_b"], summary["arms"]["scratch_b"]
    assert longer["epochs"] == scratch["epochs"]
    assert longer["train_flops_total"] == scratch["train_flops"] + summary["large"]["train_flops"]
    assert "/finetune-" in longer["stage"]


def test_planning_builds_the_unpruned_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(*arguments: Any, **options: Any) -> Any:
        built.append(1)
        return build_model(*arguments, **options)

    monkeypatch.setattr(networks, "build_model", counted)
    plan_of(configure(*SMALL, "arms=[finetune,scratch_e]"))
    assert built == [1], "a large network takes seconds"


def test_a_signal_while_weights_are_written_stops_the_stage(
    small_study: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object) -> None:
        raise Interrupted("SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(stages, "save_weights", interrupted)
    with pytest.raises(Interrupted):
        small_study("arms=[scratch_e]")
    (status,) = (tmp_path / "store/stages").glob("scratch-*/status.json")
    assert json.loads(status.read_text())["state"] == "stopped"
