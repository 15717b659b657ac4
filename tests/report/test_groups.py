"""What is gathered, what is one run, and what is kept apart."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.errors import UserError
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import RunGroup, group_runs

WriteRun = Callable[..., Path]
Run = Callable[..., dict[str, Any]]


def groups_of(*places: Path, by: tuple[str, ...] = (), mix: bool = False) -> list[RunGroup]:
    return group_runs(gather(places).runs, by=by, mix=mix)


def test_runs_of_a_study_are_one_group_and_of_another_target_another(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.5, 0.3, 0.15):
        for seed in (1, 0):
            write_run(seed, {"finetune": 90.0 + seed}, target={"ratio": ratio})
    groups = groups_of(tmp_path / "runs")
    assert [group.study.target_text for group in groups] == ["ratio 0.15", "ratio 0.3", "ratio 0.5"]
    assert [[run.study.seed for run in group.runs] for group in groups] == [[0, 1]] * 3


@pytest.mark.parametrize("name", ["dataset", "model", "pruner", "recipe", "budget"])
def test_other_names_are_other_groups(name: str, write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 90.0})
    write_run(1, {"finetune": 91.0}, **{name: "other"})
    assert len(groups_of(tmp_path / "runs")) == 2


DIFFERING: dict[str, dict[str, Any]] = {
    "recipe.lr": {"settings": {"recipe": {"lr": 0.01}}},
    "dataset.train_limit": {"settings": {"dataset": {"train_limit": 100}}},
    "large.checkpoint": {"settings": {"large": {"checkpoint": "abc"}}},
    "precision": {"precision": "bf16"},
    "test_images": {"test_images": 100},
    "processes.finetune": {"processes": {"finetune": [2]}},
}


@pytest.mark.parametrize("name", DIFFERING)
def test_other_settings_under_the_same_names_are_refused_and_named(
    name: str, write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(0, {"finetune": 90.0}, settings={"large": {"checkpoint": None}})
    write_run(1, {"finetune": 91.0}, **{"settings": {"large": {"checkpoint": None}}, **DIFFERING[name]})
    with pytest.raises(UserError, match=rf"they differ in {name} \(.* in runs/run0, .* in runs/run1\).*--by {name}"):
        groups_of(tmp_path / "runs")
    apart = groups_of(tmp_path / "runs", by=(name,))
    assert [len(group.runs) for group in apart] == [1, 1]
    assert {group.by[0][0] for group in apart} == {name}
    (mixed,) = groups_of(tmp_path / "runs", mix=True)
    assert len(mixed.runs) == 2
    assert f"mixes runs that differ in {name}" in mixed.notes[0]


def test_mixed_settings_make_pairs_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        write_run(0, {"finetune": 90.0 + lr}, settings={"recipe": {"lr": lr}})
    (mixed,) = groups_of(tmp_path / "runs", mix=True)
    assert [run.study.seed for run in mixed.runs] == [0, 0]


def test_a_setting_that_no_run_has_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 90.0})
    with pytest.raises(UserError, match=r"--by recipe\.rl: no run has this setting; did you mean recipe\.lr"):
        groups_of(tmp_path / "runs", by=("recipe.rl",))


def test_a_run_made_twice_is_counted_once(write_run: WriteRun, tmp_path: Path) -> None:
    first = write_run(0, {"finetune": 90.0})
    shutil.copytree(first, tmp_path / "runs/copy")
    (group,) = groups_of(tmp_path / "runs", first)
    assert len(group.runs) == 1
    assert "seed 0: runs/copy, runs/run0 hold the same run; it is counted once" in group.notes


def test_a_run_that_was_stopped_before_it_pruned_takes_nothing_from_the_one_that_went_on(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(0, {}, ledger={})
    write_run(0, {"large": 91.0, "finetune": 90.0})
    (group,) = groups_of(tmp_path / "runs")
    (run,) = group.runs
    assert run.study.ledger.macs_reference == 1000
    assert run.trained["finetune"].top1 == 90.0


def test_arms_added_later_complete_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"large": 91.0, "finetune": "diverged"}, arms=["finetune"])
    write_run(0, {"large": 91.0, "finetune": 90.0}, arms=["finetune"])
    write_run(0, {"large": 91.0, "scratch_e": 90.5}, arms=["scratch_e"])
    (group,) = groups_of(tmp_path / "runs")
    (run,) = group.runs
    assert {name: entry.top1 for name, entry in run.trained.items()} == {
        "large": 91.0,
        "finetune": 90.0,
        "scratch_e": 90.5,
    }
    assert run.study.arms == ("finetune", "scratch_e")


def test_a_seed_with_two_results_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 90.0})
    write_run(0, {"finetune": 91.0})
    with pytest.raises(UserError, match=r"seed 0 has two results: finetune is 90\.00 .* in runs/run0 and 91\.00"):
        groups_of(tmp_path / "runs", mix=True)


def test_other_devices_and_versions_are_noted(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 90.0})
    write_run(1, {"finetune": 91.0}, device="a card", versions={"torch": "2.14.0"})
    (group,) = groups_of(tmp_path / "runs")
    assert group.notes == (
        "runs were made with different device: CPU, a card",
        "runs were made with different torch: 2.14.0, 2.15.0",
    )


def test_runs_of_an_older_version_are_compared_by_what_they_recorded(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        file = write_run(seed, {"finetune": 90.0 + seed}) / "summary.json"
        summary = json.loads(file.read_text())
        del summary["study"]["settings"], summary["study"]["arms"]
        summary["arms"]["finetune"]["epochs"] += seed
        file.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"differ in epochs\.finetune \(4 in runs/run0, 5 in runs/run1\)"):
        groups_of(tmp_path / "runs")
    (group,) = groups_of(tmp_path / "runs", mix=True)
    assert "2 runs are of an older version" in group.notes[-1]


def test_a_store_keeps_its_runs_when_their_folders_are_gone(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[scratch_e]")
    shutil.rmtree(tmp_path / "run1")
    small_study("arms=[scratch_e]", "seed=1")
    gathered = gather([tmp_path / "store"])
    assert gathered.problems == []
    (group,) = group_runs(gathered.runs)
    kept, there = group.runs
    assert kept.arms["scratch_e"].top1 == summary["arms"]["scratch_e"]["top1"]
    curve = kept.arms["scratch_e"].curve
    assert curve is not None
    assert (len(curve), curve[-1]) == (2, summary["arms"]["scratch_e"]["top1"])
    assert there.study.seed == 1


def test_settings_of_studies_are_recorded(small_study: Run, tmp_path: Path) -> None:
    small_study("arms=[scratch_e]")
    small_study("arms=[scratch_e]", "seed=1", "recipe.lr=0.05", "recipe.eval_batch_size=50")
    with pytest.raises(UserError, match=r"they differ in recipe\.lr \((.*)\)\. Name") as refused:
        groups_of(tmp_path / "store")
    # Runs of one second come in any order.
    assert re.search(r"0\.1 in .*run1\b", str(refused.value))
    assert re.search(r"0\.05 in .*run2\b", str(refused.value))


def test_a_store_of_an_older_version_says_what_it_lost(small_study: Run, tmp_path: Path) -> None:
    small_study("arms=[scratch_e]")
    (record,) = (tmp_path / "store/runs").glob("*.json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps({"run_dir": content["run_dir"], "stages": content["stages"]}))
    assert len(gather([tmp_path / "store"]).runs) == 1
    shutil.rmtree(tmp_path / "run1")
    with pytest.raises(UserError, match="left out 1 runs whose folders are gone"):
        gather([tmp_path / "store"])


DAMAGED = {
    "{": "is damaged",
    "": "is damaged",
    "[" * 100_000: "is damaged",
    "[]": "is no summary of a run",
    "{}": "study: Field required",
    '{"study": {"seed": "one"}}': "study.dataset: Field required",
    '{"study": [], "arms": []}': "study: Input should be",
    '{"study": {}, "arms": [1]}': "is no summary of a run",
}


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_what_cannot_be_read_is_left_out_in_words(text: str, write_run: WriteRun, tmp_path: Path) -> None:
    file = tmp_path / "runs/damaged/summary.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UserError, match=DAMAGED[text]):
        gather([tmp_path / "runs"])
    write_run(0, {"finetune": 90.0})
    gathered = gather([tmp_path / "runs"])
    assert len(gathered.runs) == 1
    assert len(gathered.problems) == 1
    assert f"{file}: left out: " in gathered.problems[0]
    assert file.read_text() == text


def test_places_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"holds no summary\.json; give run folders"):
        gather([tmp_path])
    for folder in ("stages", "runs"):
        (tmp_path / "store" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="no run was recorded in this store"):
        gather([tmp_path / "store"])
    (tmp_path / "notes.json").write_text('{"format": "something else"}')
    with pytest.raises(UserError, match=r"is not the results\.json of a report"):
        gather([tmp_path / "notes.json"])


def test_names_that_no_page_can_show_are_made_harmless(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 90.0}, model="a\u0000b\n\u202ec", experiment="x\ud800y")
    (group,) = groups_of(tmp_path / "runs")
    assert (group.study.model, group.experiment) == ("a?b??c", "x?y")
