"""Architectures that other studies' pruned networks guide: small studies, from the sources to the trained network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import configure
from rethink_prune import load_model
from rethink_prune.errors import UserError
from rethink_prune.report.gather import FORMAT, FORMAT_VERSION, gather
from rethink_prune.surgery.architecture import Architecture

Run = Callable[..., dict[str, Any]]


def guided(run: Run, source: Path, *overrides: str) -> dict[str, Any]:
    return run("pruner=guided", f"pruner.sources=[{source}]", "arms=[scratch_e]", *overrides)


def kinds(tmp_path: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (tmp_path / "store/stages").iterdir())


def test_a_slimmed_network_guides_another_study(small_study: Run, tmp_path: Path) -> None:
    slimmed = small_study("pruner=slimming", "arms=[scratch_e]", "pruner.ratio=0.4")
    before = kinds(tmp_path)
    found = guided(small_study, tmp_path / "run1")
    assert "large" not in found
    assert kinds(tmp_path) == sorted([*before, "scratch"]), "nothing else is trained"
    # Three layer stages of three layers: in each, all keep the mean of what the slimmed ones keep.
    shares = [layer["kept"] / layer["full"] for layer in slimmed["pruned"]["layers"]]
    means = [sum(shares[start : start + 3]) / 3 for start in (0, 3, 6)]
    expected = [int(mean * width + 1e-9) for mean, width in zip(means, (16, 32, 64), strict=True) for _ in range(3)]
    assert [layer["kept"] for layer in found["pruned"]["layers"]] == expected
    entry = found["arms"]["scratch_e"]
    assert entry["status"] == "done"
    assert entry["train_flops_total"] == entry["train_flops"]
    model = load_model(entry["stage"])
    assert model.get_submodule("layer1.0.conv1").out_channels == expected[0]

    # What the sources are decides, not where they are or how they are named.
    stage = Path(slimmed["pruned"]["stage"])
    shutil.copytree(stage, tmp_path / "elsewhere" / stage.name)
    report = tmp_path / "results.json"
    runs = [run.model_dump(mode="json", exclude_none=True) for run in gather([tmp_path / "run1"]).runs]
    report.write_text(json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "runs": runs}))
    for place in (stage, tmp_path / "elsewhere" / stage.name, report):
        again = guided(small_study, place)
        assert again["arms"]["scratch_e"]["stage"] == entry["stage"]
        assert again["study"]["settings"] == found["study"]["settings"], "the report takes them for the same study"
    both = small_study("pruner=guided", f"pruner.sources=[{stage},{report}]", "arms=[scratch_e]")
    assert both["arms"]["scratch_e"]["stage"] == entry["stage"], "the same network under two names counts once"


def test_masks_guide_another_study_and_its_own_masks_a_third(small_study: Run, tmp_path: Path) -> None:
    pruned = small_study("pruner=magnitude", "arms=[scratch_e]", "pruner.ratio=0.7")
    found = guided(small_study, tmp_path / "run1", "pruner.rounding=nearest")
    # The shares are averages over layers of different sizes, so the sum is near, not equal.
    assert found["pruned"]["params"] == pytest.approx(pruned["pruned"]["params"], rel=0.25)
    folder = Path(found["arms"]["scratch_e"]["stage"])
    model, masks = load_model(folder), Architecture.load(folder).masks
    assert masks
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    # There is no prune stage by now: the arm has the masks.
    third = guided(small_study, tmp_path / "run2", "pruner.rounding=nearest", "seed=1")
    assert third["pruned"]["layers"] == found["pruned"]["layers"]
    drawn = Architecture.load(Path(third["arms"]["scratch_e"]["stage"])).masks
    assert not all(torch.equal(drawn[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("what", ["channels", "weights"])
def test_uniform_networks_train_alone(what: str, small_study: Run, tmp_path: Path) -> None:
    found = small_study("pruner=uniform", f"pruner.what={what}", "arms=[scratch_e,reshuffle]")
    assert "large" not in found
    assert kinds(tmp_path) == ["scratch", "ticket"]
    assert {entry["status"] for entry in found["arms"].values()} == {"done"}
    assert found["arms"]["scratch_e"]["params"] == found["pruned"]["params"] < 0.6 * 269_722


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("finetune", r"and finetune needs inherited ones; take arms=\[scratch_e,scratch_b\]"),
        ("scratch_e,lottery,reshuffle", r"and lottery needs inherited ones; take arms=\[scratch_e,reshuffle\]"),
        ("retrain@2", r"pruner=uniform: has fresh weights only, and retrain@2 needs"),
        ("lr_rewind", r"pruner=uniform: has fresh weights only, and lr_rewind needs"),
    ],
)
def test_an_arm_that_inherits_weights_is_refused_with_what_to_type(
    arms: str, message: str, small_study: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small_study("pruner=uniform", f"arms=[{arms}]")
    assert not (tmp_path / "store/stages").exists()


def test_the_files_set_arms_that_fit_and_sources_have_to_be_given() -> None:
    assert configure("pruner=uniform").arms == ("scratch_e", "scratch_b")
    assert configure("pruner=guided", "pruner.sources=run").arms == ("scratch_e", "scratch_b")
    with pytest.raises(UserError, match=r"pruner\.sources=\?\?\?: must name pruned networks"):
        configure("pruner=guided")
