"""Stages: keys, locks, status, damage. Processes are real ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from harness import SMALL, configure
from rethink_prune import files, status
from rethink_prune.errors import UserError
from rethink_prune.store import ownership, store
from rethink_prune.store.stage import Stage, Started
from rethink_prune.store.store import Store
from rethink_prune.store.weights import save_weights
from rethink_prune.study.keys import stage_name
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts

CONFIG = {"network": {}, "key": {}}


def finished(root: Path, key: int = 1) -> Stage:
    made = Store(root)
    made.prepare()
    stage = made.stage(f"large-{key}")
    with stage.hold():
        stage.begin(CONFIG, None)
        save_weights(stage.model_file, {"w": torch.arange(4.0)})
        stage.finish({"top1": 50.0})
    return stage


def test_keys_do_not_depend_on_order_but_on_everything_else() -> None:
    assert stage_name("large", {"a": 1, "b": {"c": 2, "d": 3}}) == stage_name("large", {"b": {"d": 3, "c": 2}, "a": 1})
    assert stage_name("large", {"a": 1}) != stage_name("large", {"a": 1.5})
    assert stage_name("large", {"a": 1}).split("-")[1] != stage_name("scratch", {"a": 1}).split("-")[1]


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    finished(tmp_path)
    again = Store(tmp_path).stage("large-1")
    assert again.result() == {"top1": 50.0}
    assert again.digest == files.file_digest(again.model_file)


def test_a_truncated_model_file_is_noticed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = finished(tmp_path)
    stage.model_file.write_bytes(stage.model_file.read_bytes()[:-3])
    assert stage.result() is None
    assert str(stage.model_file) in caplog.text


def test_a_damaged_status_means_not_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = finished(tmp_path)
    (stage.folder / "status.json").write_text('{"state": "do')
    assert stage.result() is None
    assert "status.json is damaged" in caplog.text


def test_a_stage_that_started_from_other_weights_is_an_error(tmp_path: Path) -> None:
    made = Store(tmp_path)
    made.prepare()
    stage = made.stage("finetune-1")
    with stage.hold():
        stage.begin(CONFIG, Started("prune-1", "a" * 64))
    with pytest.raises(UserError, match="started from other weights than prune-1 holds now"):
        stage.result(Started("prune-1", "b" * 64))


def test_a_file_in_the_stores_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(UserError, match=r"store\.root=.*cannot be written"):
        Store(tmp_path / "store").prepare()
    assert (tmp_path / "store").read_text() == "not a folder"


def test_a_store_of_a_later_version_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "store"
    Store(root).prepare()
    assert json.loads((root / "format.json").read_text()) == {"format": store.FORMAT}
    (root / "format.json").write_text(f'{{"format": {store.FORMAT + 1}, "new": "keys"}}')
    with pytest.raises(UserError, match=f"has format {store.FORMAT + 1}, from a later version of rethink-prune"):
        Store(root).prepare()
    assert status.main([str(root), "--clean", "--yes"]) == 1
    assert capsys.readouterr().err.startswith(f"store.root={root}: has format {store.FORMAT + 1}")
    with pytest.raises(UserError, match="from a later version"), Interrupts() as interrupts:
        run_study(configure(*SMALL, "dry_run=true", f"store.root={root}"), tmp_path / "run", interrupts)
    assert not (tmp_path / "run").exists()


def test_a_store_made_before_formats_were_written_is_used_as_it_is(tmp_path: Path) -> None:
    stage = finished(tmp_path)
    (tmp_path / "format.json").unlink()
    Store(tmp_path).prepare()
    assert stage.result() == {"top1": 50.0}
    assert not (tmp_path / "format.json").exists()


def test_a_damaged_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text("{}")
    with pytest.raises(UserError, match=r"format\.json: is damaged"):
        Store(tmp_path).check()


def test_a_dry_run_leaves_a_store_as_it_is(tmp_path: Path) -> None:
    stage = finished(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    with Interrupts() as interrupts:
        config = configure(*SMALL, "dry_run=true", f"store.root={tmp_path / 'store'}")
        run_study(config, tmp_path / "run", interrupts)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    assert stage.result() == {"top1": 50.0}


def test_full_disk_is_a_clear_error_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A 1 MiB file system, where mounting is allowed."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        stage = finished(mount)
        with stage.hold(), pytest.raises(UserError, match="the disk is full"):
            save_weights(stage.folder / "big.safetensors", {"w": torch.zeros(1 << 20)})
        assert stage.result() == {"top1": 50.0}
    finally:
        subprocess.run(["umount", str(mount)], check=True)


HOLDER = """
    import sys, time
    from pathlib import Path
    from rethink_prune.store.store import Store
    made = Store(Path(sys.argv[1])); made.prepare()
    stage = made.stage("large-1")
    with stage.hold():
        stage.begin({"network": {}, "key": {}}, None)
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def holder(root: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(root), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_waits_for_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = holder(tmp_path, 2)
    start = time.monotonic()
    with caplog.at_level("INFO"), Store(tmp_path).stage("large-1").hold():
        waited = time.monotonic() - start
    assert process.wait() == 0
    assert waited > 1
    assert f"process {process.pid}" in caplog.text


def test_a_killed_process_frees_its_stage_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path, 60)
    process.kill()
    process.wait()
    start = time.monotonic()
    with Store(tmp_path).stage("large-1").hold():
        assert time.monotonic() - start < 5


def test_a_silent_owner_is_replaced_and_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process keeps its lock but sends no heartbeat; when it wakes up, the stage is no longer its own."""
    monkeypatch.setattr(ownership, "STALE_SECONDS", 3.0)
    process = holder(tmp_path, 60)
    process.send_signal(signal.SIGSTOP)
    stage = Store(tmp_path).stage("large-1")
    try:
        with stage.hold():
            stage.begin(CONFIG, None)
            first_owner = Stage(stage.folder)
            with pytest.raises(UserError, match="taken over by another process"):
                first_owner.check_owner()
            stage.check_owner()
    finally:
        process.kill()
        process.wait()
