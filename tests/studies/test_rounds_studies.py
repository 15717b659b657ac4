"""Studies that prune in rounds: what each round leaves, which stages they share, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import SMALL, configure, plan_of
from rethink_prune.errors import UserError
from rethink_prune.study import stages
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.prepare import prepare_study
from rethink_prune.study.work import do_stage
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.train import Diverged

Run = Callable[..., dict[str, Any]]
TICKETS = ("arms=[lottery]", "dataset.train_limit=80", "dataset.test_limit=50")


def test_rounds_reach_the_widths_of_one_cut(small_study: Run) -> None:
    one = plan_of(configure(*SMALL, "pruner.ratio=0.7"))
    summary = small_study("pruner.ratio=0.7", "pruner.rounds=3", *TICKETS)
    assert summary["pruned"]["layers"] == one["pruned"]["layers"]
    assert summary["pruned"]["macs"] == one["pruned"]["macs"]
    rounds = summary["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    channels = sum(layer["full"] for layer in summary["pruned"]["layers"])
    shares = [entry["channels"] / channels for entry in rounds]
    # Rounded down to whole channels in each layer.
    assert shares == pytest.approx([0.3 ** (1 / 3), 0.3 ** (2 / 3), 0.3], abs=0.04)
    assert rounds[-1]["channels"] == sum(layer["kept"] for layer in summary["pruned"]["layers"])
    assert rounds[0]["top1_before"] == summary["large"]["top1"]
    assert rounds[1]["top1_before"] == rounds[0]["top1_trained"]
    assert rounds[-1]["top1"] == summary["pruned"]["top1"]
    assert rounds[-1]["top1_trained"] is None
    assert [entry["macs"] for entry in rounds] == sorted((entry["macs"] for entry in rounds), reverse=True)
    # All that was trained on the way is an ancestor.
    own = summary["arms"]["lottery"]["train_flops"]
    between = sum(entry["train_flops"] for entry in rounds)
    assert between > 0
    assert summary["arms"]["lottery"]["train_flops_total"] == summary["large"]["train_flops"] + between + own
    plan = plan_of(configure(*SMALL, *TICKETS, "pruner.ratio=0.7", "pruner.rounds=3"))
    assert plan["arms"]["lottery"]["train_flops_total"] == summary["arms"]["lottery"]["train_flops_total"]
    assert list(plan["before_arms"]) == ["round_1", "round_2"]


@pytest.mark.slow
def test_each_round_prunes_what_the_training_before_it_left(small_study: Run) -> None:
    summary = small_study("pruner.ratio=0.6", "pruner.rounds=2", "pruner.between_rounds=none", *TICKETS)
    first, last = summary["rounds"]
    assert Path(first["trained_stage"]).name.startswith("finetune-")
    trained = load_file(Path(first["trained_stage"]) / "model.safetensors")
    before, after = (Architecture.load(Path(entry["stage"])) for entry in (first, last))
    left = load_file(Path(last["stage"]) / "model.safetensors")
    name = "layer1.0.conv1"
    # By hand: the filters of largest sums remain, in their order.
    sums = trained[f"{name}.weight"].double().abs().flatten(1).sum(1)
    width = after.modules[name]["out_channels"]
    kept = sums.sort(descending=True, stable=True).indices[:width].sort().values
    assert torch.equal(left[f"{name}.weight"], trained[f"{name}.weight"][kept])
    assert torch.equal(after.outputs[name], before.outputs[name][kept])


def test_a_study_with_more_rounds_takes_the_first_ones_from_the_store(small_study: Run, tmp_path: Path) -> None:
    share = ("pruner.ratio=null", "pruner.share_per_round=0.3", *TICKETS)
    two, three = (small_study(*share, f"pruner.rounds={count}") for count in (2, 3))
    for key in ("stage", "top1", "channels"):
        assert [entry[key] for entry in three["rounds"][:2]] == [entry[key] for entry in two["rounds"]]
    # The ticket of the shorter study is the training between the rounds of the longer one.
    assert three["rounds"][1]["trained_stage"] == two["arms"]["lottery"]["stage"]
    names = [path.name.partition("-")[0] for path in (tmp_path / "store/stages").iterdir()]
    assert sorted(names) == ["large", "prune", "prune", "prune", "ticket", "ticket", "ticket"]


@pytest.mark.parametrize("between", ["init", pytest.param("epoch", marks=pytest.mark.slow)])
def test_masks_shrink_and_never_regrow(small_study: Run, between: str) -> None:
    options = ("pruner=magnitude", "pruner.ratio=0.75", "pruner.rounds=2", f"pruner.between_rounds={between}")
    summary = small_study(*options, *TICKETS, "rewind.epoch=1")
    first, last = (Architecture.load(Path(entry["stage"])).masks for entry in summary["rounds"])
    total = sum(mask.numel() for mask in first.values())
    left = [sum(int(mask.sum()) for mask in masks.values()) for masks in (first, last)]
    # Half of what is there in each; one more by the published rule.
    assert left[0] == total - int(total * 0.5) - 1
    assert left[1] == left[0] - int(left[0] * 0.5) - 1
    assert all(not (last[name] & ~mask).any() for name, mask in first.items())
    assert summary["rounds"][0]["channels"] is None
    assert [entry["weights"] for entry in summary["rounds"]] == [entry["params"] for entry in summary["rounds"]]
    # The training between the rounds never moved what was gone.
    trained = load_file(Path(summary["rounds"][0]["trained_stage"]) / "model.safetensors")
    assert all(not trained[name][~mask].any() for name, mask in first.items())
    kind = "ticket-"
    assert Path(summary["rounds"][0]["trained_stage"]).name.startswith(kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("pruner=random", "pruner.scope=all"),
        ("pruner=l1", "pruner.ranking=global"),
        ("pruner=thinet", "pruner.images=40"),
        ("pruner=regression", "pruner.images=40"),
        ("pruner=fpgm", "model=preresnet20"),
        ("pruner=magnitude", "pruner.distribution=erk"),
        ("pruner=lamp",),
    ],
)
def test_pruners_in_rounds(small_study: Run, options: tuple[str, ...]) -> None:
    summary = small_study(*options, "pruner.rounds=2", "arms=[finetune,lottery,reshuffle,scratch_e]", *TICKETS[1:])
    assert {arm["status"] for arm in summary["arms"].values()} == {"done"}
    assert len({arm["macs"] for arm in summary["arms"].values()}) == 1
    assert summary["rounds"][0]["macs"] > summary["rounds"][1]["macs"] == summary["pruned"]["macs"]


def test_a_round_that_fails_ends_the_study_in_words(
    small_study: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(study: Any, interrupts: Any, spec: StageSpec, *arguments: Any) -> Any:
        if spec.title == "round_1":
            raise Diverged("the training loss became nan", 1)
        return do_stage(study, interrupts, spec, *arguments)

    monkeypatch.setattr(stages, "do_stage", fail)
    with pytest.raises(UserError, match="lottery failed: round_1 failed, so"):
        small_study("pruner.rounds=2", *TICKETS)


def test_only_scratch_arms_of_known_widths_need_no_rounds() -> None:
    study = prepare_study(configure(*SMALL, "pruner.rounds=3", "arms=[scratch_e,reshuffle]"))
    assert [spec.title for spec in study.plan()] == ["scratch_e", "reshuffle"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner.rounds=1"], "pruner.rounds=1: must be from 2 to 1000; for one round, leave it out"),
        (["pruner.rounds=2", "pruner.share_per_round=0.2"], "add pruner.ratio=null to the command"),
        (
            ["pruner.ratio=null", "pruner.share_per_round=0.2"],
            "share_per_round=0.2: needs rounds, e.g. pruner",
        ),
        (
            ["pruner.rounds=2", "pruner.ratio=null", "pruner.share_per_round=1"],
            "pruner.share_per_round=1: must be",
        ),
        (["pruner.between_rounds=none"], "between_rounds=none: needs rounds, e.g. pruner.rounds=5"),
        (["together=0"], "together=0: must be auto or a number from 1"),
        (["pruner.between_rounds=start"], "pruner.between_rounds=start: must be init, epoch or none"),
        (["pruner.redraw=sparse"], "pruner.redraw=sparse: must be nonzeros or dense"),
    ],
)
def test_bad_rounds_are_said_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(*SMALL, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner=sss"], "pruner.rounds=2: sss cannot prune in rounds: the strength of its penalty decides"),
        (["pruner=slimming"], "pruner.rounds=2: slimming cannot prune in rounds: "),
        (["pruner=soft_filter"], "pruner.rounds=2: soft_filter cannot prune in rounds: "),
        (["pruner=snip"], "pruner.rounds=2: snip cannot prune in rounds: "),
        (
            ["pruner.ratio=null", "pruner.share_per_round=0.999"],
            "pruner.rounds=2 pruner.share_per_round=0.999: leaves nothing",
        ),
        (["pruner.rounds=40"], "pruner.rounds=40: round 13 would remove nothing; take fewer rounds"),
        (["pruner=magnitude", "pruner.min_share=0.1"], "pruner.min_share is a share of the unpruned layer"),
        (
            ["pruner=magnitude", "pruner.ratio=null", "pruner.target_macs=0.5"],
            "needs pruner.ratio or pruner.share",
        ),
    ],
)
def test_rounds_that_do_not_fit_are_said_before_any_training(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_study(configure(*SMALL, "pruner.rounds=2", *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
