"""Tickets and rewinding: what they start from, what their stages depend on and share, and what they cost."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness import SMALL, configure, plan_of
from rethink_prune.errors import UserError
from rethink_prune.files import file_digest
from rethink_prune.state import full_state
from rethink_prune.study.keys import add_keys
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.prepare import PreparedStudy, prepare_study
from rethink_prune.study.work import train_stage
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.interrupts import Interrupts

Run = Callable[..., dict[str, Any]]


def planned(*overrides: str) -> dict[str, StageSpec]:
    study = prepare_study(configure(*SMALL, *overrides))
    return {spec.title: spec for spec in add_keys(study.plan(), study.parts, {})}


def start_of(study: PreparedStudy, summary: dict[str, Any], weights: str | None = None) -> nn.Module:
    """Return the ticket of a study's prune stage."""
    folder = Path(summary["pruned"]["stage"])
    state = None if weights is None else load_file(Path(summary[weights]["stage"]) / "model.safetensors")
    return study.networks.ticket(Architecture.load(folder), state)


def rows_of(entry: dict[str, Any]) -> list[dict[str, str]]:
    with (Path(entry["stage"]) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_ticket_has_the_first_weights_of_what_remains(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[lottery]")
    study = prepare_study(configure(*SMALL, f"store.root={tmp_path / 'store'}", "arms=[lottery]"))
    initial = study.networks.large()
    kept = Architecture.load(Path(summary["pruned"]["stage"])).outputs
    ticket = start_of(study, summary)
    norms = {name: (initial.get_submodule(f"{name}"), ticket.get_submodule(f"{name}")) for name in kept}
    assert any(len(kept[name]) < len(wide.weight) for name, (wide, _) in norms.items())
    for name, (wide, narrow) in norms.items():
        for key, tensor in narrow.state_dict().items():
            # Weights, biases and running statistics; inputs are compared where they are whole.
            if tensor.ndim == 1:
                assert torch.equal(tensor, wide.state_dict()[key][kept[name]]), f"{name}.{key}"
    # Trained as Scratch-E is: same length, same rates.
    large, arm = rows_of(summary["large"]), rows_of(summary["arms"]["lottery"])
    assert [row["lr"] for row in arm] == [row["lr"] for row in large]


def test_early_weights_are_those_of_large_passing_there(small_study: Run, tmp_path: Path) -> None:
    options = ("arms=[weight_rewind,scratch_e]", "recipe.epochs=3", "rewind.epoch=2")
    summary = small_study(*options)
    study = prepare_study(configure(*SMALL, f"store.root={tmp_path / 'store'}", *options))
    large = {spec.title: spec for spec in study.plan()}["large"]
    passing: dict[int, dict[str, torch.Tensor]] = {}
    model = study.networks.large()

    def remember(rows: list[Any]) -> None:
        passing[len(rows)] = {name: tensor.clone() for name, tensor in full_state(model).items()}

    with Interrupts() as interrupts:
        train_stage(study, large, model, interrupts, on_epoch=remember)
    early = load_file(Path(summary["early"]["stage"]) / "model.safetensors")
    assert summary["early"]["epochs"] == 2
    assert all(torch.equal(early[name].view_as(tensor), tensor) for name, tensor in passing[2].items())
    assert not all(torch.equal(early[name].view_as(tensor), tensor) for name, tensor in passing[3].items())
    # Its epochs are the first of large, and are paid for there.
    arms = summary["arms"]
    assert arms["weight_rewind"]["train_flops_total"] == (
        summary["large"]["train_flops"] + arms["weight_rewind"]["train_flops"]
    )
    plan = plan_of(configure(*SMALL, *options))
    assert plan["arms"]["weight_rewind"]["train_flops_total"] == arms["weight_rewind"]["train_flops_total"]
    assert plan["before_arms"]["early"]["epochs"] == 2
    assert summary["early"]["train_flops"] == plan["before_arms"]["early"]["train_flops"]


def test_no_option_of_rewinding_changes_another_stage() -> None:
    arms = "arms=[finetune,scratch_e,lottery,weight_rewind,lr_rewind,reshuffle]"
    one, two = (planned(arms, "recipe.epochs=4", f"rewind.epoch={epoch}") for epoch in (1, 2))
    three = planned(arms, "recipe.epochs=4", "rewind.epoch=1", "rewind.length=1")
    plain = planned("arms=[finetune,scratch_e]", "recipe.epochs=4")
    for title, spec in plain.items():
        assert one[title].key == two[title].key == spec.key
    assert {title for title in one if one[title].key != two[title].key} == {"early", "weight_rewind"}
    assert {title for title in one if one[title].key != three[title].key} == {"lr_rewind"}


def test_less_than_an_epoch_is_the_start_and_said_once(
    small_study: Run, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        summary = small_study("arms=[weight_rewind,lottery,lottery@e]")
    assert "early" not in summary
    (stage,) = {arm["stage"] for arm in summary["arms"].values()}
    assert Path(stage).name.startswith("ticket-")
    said = [warning for warning in summary["study"]["warnings"] if "rewind.epoch=0.1" in warning]
    assert len(said) == 1
    assert (caplog.text + capsys.readouterr().out).count("goes back to the start") == 1


@pytest.mark.slow
def test_names_of_one_ticket_are_one_stage(small_study: Run) -> None:
    summary = small_study("arms=[lottery,lottery@2,lottery_b,lottery@b,reshuffle,reshuffle@e]")
    stages = {name: arm["stage"] for name, arm in summary["arms"].items()}
    assert stages["lottery"] == stages["lottery@2"]
    assert stages["lottery_b"] == stages["lottery@b"]
    assert stages["reshuffle"] == stages["reshuffle@e"]
    assert len(set(stages.values())) == 3


def test_the_end_of_the_schedule_is_replayed(small_study: Run) -> None:
    for schedule in ("multistep", "cosine"):
        milestones = [] if schedule == "cosine" else ["recipe.milestones=[2,3]"]
        options = ("recipe.epochs=4", f"recipe.schedule={schedule}", "dataset.train_limit=80", *milestones)
        if schedule == "cosine":
            options = (*options, "recipe.milestones=[]")
        summary = small_study("arms=[lr_rewind]", *options)
        large, arm = rows_of(summary["large"]), rows_of(summary["arms"]["lr_rewind"])
        assert [float(row["lr"]) for row in arm] == pytest.approx([float(row["lr"]) for row in large[2:]])
        plan = plan_of(configure(*SMALL, "arms=[lr_rewind]", *options))
        assert plan["arms"]["lr_rewind"]["milestones"] == ([1] if milestones else [])


def test_a_random_ticket_needs_no_training_and_keeps_as_much(tmp_path: Path) -> None:
    assert list(planned("arms=[reshuffle]")) == ["reshuffle"]
    study = prepare_study(configure(*SMALL, "arms=[reshuffle]"))
    architecture = study.target.reshuffled(study.target.report().layers, torch.Generator().manual_seed(0))
    assert architecture == study.target.known_architecture
    initial = study.networks.large()
    ticket = study.networks.ticket(architecture)
    name, kept = next((name, kept) for name, kept in architecture.outputs.items() if "conv" in name)
    assert kept.tolist() != list(range(len(kept)))
    assert torch.equal(
        ticket.get_parameter(f"{name}.weight").flatten(1).sum(1),
        initial.get_parameter(f"{name}.weight")[kept].flatten(1).sum(1),
    )


def test_the_ticket_of_masks(small_study: Run, tmp_path: Path) -> None:
    options = ("pruner=magnitude", "pruner.ratio=0.7", "arms=[lottery,reshuffle]")
    summary = small_study(*options)
    study = prepare_study(configure(*SMALL, f"store.root={tmp_path / 'store'}", *options))
    architecture = Architecture.load(Path(summary["pruned"]["stage"]))
    initial, ticket = study.networks.large(), start_of(study, summary)
    for name, mask in architecture.masks.items():
        assert torch.equal(ticket.get_parameter(name), initial.get_parameter(name) * mask)
    trained = load_file(Path(summary["arms"]["lottery"]["stage"]) / "model.safetensors")
    assert all(not trained[name][~mask].any() for name, mask in architecture.masks.items())
    shuffled = Architecture.load(Path(summary["arms"]["reshuffle"]["stage"])).masks
    for name, mask in architecture.masks.items():
        assert shuffled[name].sum() == mask.sum()
    assert any(not torch.equal(shuffled[name], mask) for name, mask in architecture.masks.items())


@pytest.mark.slow
def test_a_pruners_own_training_is_rewound(small_study: Run) -> None:
    summary = small_study("pruner=slimming", "arms=[weight_rewind]", "recipe.epochs=3", "rewind.epoch=1")
    early = Path(summary["early"]["stage"])
    assert '"part_of": "sparse-' in (early / "status.json").read_text()
    total = sum(summary[name]["train_flops"] for name in ("sparse",)) + summary["arms"]["weight_rewind"]["train_flops"]
    assert summary["arms"]["weight_rewind"]["train_flops_total"] == total


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["sss", "thinet", "soft_filter"])
def test_other_pruners_have_tickets(small_study: Run, pruner: str) -> None:
    options = ["pruner.sparse.strength=10"] if pruner == "sss" else ["pruner.images=40"] if pruner == "thinet" else []
    summary = small_study(f"pruner={pruner}", "arms=[lottery,reshuffle]", "dataset.train_limit=80", *options)
    assert {arm["status"] for arm in summary["arms"].values()} == {"done"}
    assert len({arm["macs"] for arm in summary["arms"].values()}) == 1


def test_random_weights_at_the_dense_fan_out(tmp_path: Path) -> None:
    study = prepare_study(configure(*SMALL, "pruner.ratio=0.75", "model=vgg11", "dataset.image_size=32"))
    architecture = study.target.known_architecture
    name = next(name for name, values in architecture.modules.items() if values.get("out_channels", 0) >= 64)
    narrow = study.networks.scratch(architecture).get_parameter(f"{name}.weight")
    dense = study.networks.scratch(architecture, dense=True).get_parameter(f"{name}.weight")
    # A fan-out four times as wide has half the standard deviation.
    assert (narrow.std() / dense.std()).item() == pytest.approx(2, rel=0.05)
    masked = Architecture(masks={"features.0.weight": torch.arange(64 * 3 * 9).view(64, 3, 3, 3) % 4 == 0})
    sparse, full = (study.networks.scratch(masked, dense=dense) for dense in (False, True))
    left = masked.masks["features.0.weight"]
    ratio = sparse.get_parameter("features.0.weight")[left].std() / full.get_parameter("features.0.weight")[left].std()
    assert ratio.item() == pytest.approx(2, rel=0.02), "the same draws, scaled"


def test_the_dense_fan_out_is_in_the_key_of_scratch_arms_alone() -> None:
    arms = "arms=[finetune,scratch_e,lottery]"
    usual, dense = planned(arms), planned(arms, "pruner.redraw=dense")
    assert {title for title in usual if usual[title].key != dense[title].key} == {"scratch_e"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arms=[weight_rewind]", "rewind.epoch=2"], "rewind.epoch=2: must be before the end, recipe.epochs=2"),
        (["arms=[lr_rewind]", "rewind.length=3"], "rewind.length=3: is longer than recipe.epochs=2"),
        (["rewind.epoch=1.5"], "rewind.epoch=1.5: must be whole epochs, or below 1 a share of recipe.epochs"),
        (["rewind.epoch=-1"], "rewind.epoch=-1: must be greater than or equal to 0"),
        (["rewind.length=0"], "rewind.length=0: must be greater than 0"),
        (["arms=[lr_rewind@2]"], "lr_rewind@2: the length of lr_rewind is given"),
        (["arms=[lottery@0]"], "lottery@0: 0 epochs: must be from 1"),
    ],
)
def test_bad_rewinds_are_said_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(*SMALL, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_less_than_an_epoch_is_no_length() -> None:
    study = prepare_study(configure(*SMALL, "arms=[lr_rewind]", "rewind.length=0.1"))
    with pytest.raises(UserError, match=r"arms: lr_rewind: rewind.length=0.1 is less than one of the 2 epochs"):
        study.plan()


@pytest.mark.slow
def test_given_weights_have_no_start(small_study: Run) -> None:
    stage = small_study("arms=[finetune]")["large"]["stage"]
    for arm in ("lottery", "weight_rewind", "reshuffle"):
        with pytest.raises(UserError, match=f"arms={arm}: needs the weights that the unpruned network started from"):
            small_study(f"arms=[{arm}]", f"large.checkpoint={stage}")
    assert small_study("arms=[lr_rewind]", f"large.checkpoint={stage}")["arms"]["lr_rewind"]["status"] == "done"


def test_a_stage_of_an_earlier_version_has_no_ticket(small_study: Run) -> None:
    summary = small_study("arms=[finetune]")
    folder = Path(summary["pruned"]["stage"])
    Architecture.load(folder).without_positions().save(folder)
    (folder / "architecture.safetensors").unlink()
    status = json.loads((folder / "status.json").read_text())
    status["digests"]["architecture.json"] = file_digest(folder / "architecture.json")
    (folder / "status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match=f"{folder}: does not say which channels remain"):
        small_study("arms=[lottery]")
    assert small_study("arms=[finetune]")["pruned"]["stage"] == str(folder), "still good for others"
