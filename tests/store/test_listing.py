"""What a store says of its stages, and what may be removed from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.errors import UserError
from rethink_prune.status import main
from rethink_prune.store.listing import StageProgress, StageState, list_stages, stages_table
from rethink_prune.store.stage import Stage
from rethink_prune.text import size

Run = Callable[..., dict[str, Any]]


def stage(store: Path, name: str, *, epochs: int = 10, done: int = 0) -> Stage:
    """Begin a stage as a study does, with some epochs done."""
    made = Stage(store / "stages" / name)
    made.folder.mkdir(parents=True)
    made.begin({"network": {"name": "resnet20"}, "key": {"training": {"epochs": epochs}}, "title": "large"}, None)
    rows = ["epoch,seconds", *(f"{epoch},{2.0 * epoch}" for epoch in range(1, done + 1))]
    if done:
        (made.folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with a stage in every state but done."""
    store = tmp_path / "store"
    stage(store, "large-running", done=4)
    stage(store, "large-failed").fail("the training loss became nan in epoch 3")
    stage(store, "large-stopped", done=1).stop()
    (store / "stages/large-unfinished").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    died = stage(store, "large-died")
    status = (died.folder / "status.json").read_text().replace(f'"pid": {os.getpid()}', f'"pid": {dead.pid}')
    (died.folder / "status.json").write_text(status)
    silent = stage(store, "large-silent")
    os.utime(silent.folder / "status.json", (0, 0))
    return store


def by_name(store: Path) -> dict[str, StageState]:
    return {found.folder.name.removeprefix("large-"): found for found in list_stages(store)}


def test_every_state_is_told_with_its_progress(store: Path) -> None:
    found = by_name(store)
    assert {name: each.state for name, each in found.items()} == {
        "running": "running",
        "died": "stale",
        "silent": "stale",
        "failed": "failed",
        "stopped": "stopped",
        "unfinished": "unfinished",
    }
    assert list(found) == ["running", "died", "silent", "failed", "stopped", "unfinished"]
    running = found["running"]
    assert (running.progress.epoch, running.progress.epochs, running.progress.remaining) == (4, 10, 12.0)
    assert running.note.startswith(f"process {os.getpid()} on ")
    assert found["failed"].note == "the training loss became nan in epoch 3"
    table = stages_table(store, list_stages(store))
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[1:6] == ["running", "large-running", "resnet20 (large)", "4/10", "12 s"]
    assert "1 running, 2 stale, 1 failed, 1 stopped, 1 unfinished; " in table


def test_a_long_table_ends_with_how_many_stages_follow(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = stages_table(store, list_stages(store), most=2)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["running", "stale"]
    assert table.splitlines()[5] == "and 4 more stages, which --all lists"
    assert "1 running, 2 stale, 1 failed, 1 stopped, 1 unfinished; " in table
    for name in range(100):
        (store / "stages" / f"large-{name}").mkdir()
    assert main([str(store)]) == 0
    assert "and 6 more stages, which --all lists" in capsys.readouterr().out
    assert main([str(store), "--all"]) == 0
    assert "more stages" not in capsys.readouterr().out


def test_clean_removes_what_is_needless_after_asking(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert main([str(store), "--clean"]) == 0
    assert "Remove these 5 stages" in asked[0]
    assert len(by_name(store)) == 6
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main([str(store), "--clean"]) == 0
    assert list(by_name(store)) == ["running"]
    assert "Removed 5 stages" in capsys.readouterr().out
    assert main([str(store), "--clean", "--yes"]) == 0
    assert capsys.readouterr().out == "Nothing to remove.\n"


def test_a_stage_that_a_process_holds_is_never_removed(store: Path) -> None:
    held = Stage(store / "stages/large-stopped")
    with held.hold():
        assert main([str(store), "--clean", "--yes"]) == 0
        assert held.folder.is_dir()
    assert set(by_name(store)) == {"running", "stopped"}
    assert [path.name for path in (store / "stages").iterdir() if path.name.startswith(".")] == []


def test_finished_stages_go_only_if_no_run_is_left_that_uses_them(small_study: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    small_study("arms=[finetune]")
    small_study("arms=[finetune]", "pruner.ratio=0.7")
    names = {found.folder.name.split("-")[0]: found for found in list_stages(store)}
    assert set(names) == {"large", "prune", "finetune"}
    assert names["large"].progress == StageProgress("resnet20 (large)", 2, 2, None)
    assert main([str(store), "--clean", "--yes"]) == 0
    assert len(list_stages(store)) == 5

    shutil.rmtree(tmp_path / "run2")
    assert "used by no run" in stages_table(store, list_stages(store))
    assert main([str(store), "--clean", "--yes"]) == 0
    assert len(list_stages(store)) == 3
    again = small_study("arms=[finetune]")
    assert again["large"]["stage"] == str(names["large"].folder), "what runs use is still there"


def test_what_is_no_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is no store"):
        list_stages(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"{tmp_path}: is no store: it has no folder stages\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000_000, "2.34 GB")])
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text
