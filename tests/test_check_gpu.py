"""The check of a machine with a GPU, on a CPU: every part runs, and one that fails does not take the others along."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import benchmark
import check_gpu
from check_gpu import Check, FailedError, Part, run_parts

ROOT = Path(__file__).parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(check_gpu, "GRACE", 0.5)
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    return Check(tmp_path / "out", tmp_path / "work", "cpu")


def records(check: Check) -> dict[str, dict[str, Any]]:
    return json.loads((check.out / "check.json").read_text())["parts"]


def test_a_part_that_fails_is_recorded_with_its_last_lines_and_the_next_goes_on(check: Check) -> None:
    def fails(check: Check, found: dict[str, Any]) -> None:
        found["before"] = 1
        check.call(*python("for i in range(30): print('line', i)\nraise SystemExit('broken')"))

    def works(check: Check, found: dict[str, Any]) -> None:
        assert records(check)["works"]["state"] == "running"
        assert records(check)["fails"]["state"] == "failed", "written before the next part"
        check.call(*python("print('well')"))

    assert not run_parts(check, [Part("fails", 30, fails, 0), Part("works", 30, works, 0)], seconds=60)
    found = records(check)
    assert found["fails"]["before"] == 1
    assert found["fails"]["reason"].startswith("status 1: ")
    assert found["fails"]["last_lines"] == [*(f"line {i}" for i in range(11, 30)), "broken"]
    assert found["works"]["state"] == "done"
    assert "last_lines" not in found["works"]
    assert (check.out / "fails.log").read_text().splitlines() == [*(f"line {i}" for i in range(30)), "broken"]
    assert run_parts(check, [Part("works", 30, lambda *arguments: None, 0)], seconds=60)


def test_a_part_that_takes_too_long_is_ended_with_its_children(check: Check) -> None:
    child = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )

    def endless(check: Check, found: dict[str, Any]) -> None:
        check.call(*python(f"{child}; print(child.pid, flush=True); time.sleep(60)"))

    start = time.monotonic()
    parts = [Part("endless", 2.5, endless, 0), Part("next", 30, lambda *arguments: None, 0)]
    assert not run_parts(check, parts, seconds=60)
    assert time.monotonic() - start < 10
    found = records(check)
    assert (found["endless"]["state"], found["next"]["state"]) == ("out of time", "done")
    (pid,) = found["endless"]["last_lines"]
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "the child is gone"


def test_a_part_is_left_out_without_time_or_images(check: Check) -> None:
    def never(check: Check, found: dict[str, Any]) -> None:
        raise AssertionError

    parts = [Part("long", 900, never, least=100), Part("paper", 60, never, least=0, needs_images=True)]
    assert run_parts(check, parts, seconds=60)
    assert [record["state"] for record in records(check).values()] == ["left out", "left out"]
    assert records(check)["long"]["reason"] == "60 s are left of at least 100"
    assert records(check)["paper"]["reason"] == "needs --images"


def test_other_bits_after_a_kill_fail_the_part(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def study(self: Check, name: str, *overrides: str) -> list[str]:
        return python("import time; time.sleep(60)" if "store.checkpoint_seconds=0" in overrides else "")

    weights = {"deterministic": {"large-1": "a", "finetune-2": "b"}, "deterministic_killed": {"large-1": "a"}}
    monkeypatch.setattr(Check, "study", study)
    monkeypatch.setattr(check_gpu, "in_the_middle", lambda check, name: True)
    monkeypatch.setattr(check_gpu, "digests", lambda check, name: weights[name])
    with pytest.raises(FailedError, match="not the same bits after the kill: other stages"):
        check_gpu.check_deterministic(check, {})
    weights["deterministic_killed"]["finetune-2"] = "c"
    with pytest.raises(FailedError, match="not the same bits after the kill: finetune-2"):
        check_gpu.check_deterministic(check, {})
    weights["deterministic_killed"]["finetune-2"] = "b"
    found: dict[str, Any] = {}
    check_gpu.check_deterministic(check, found)
    assert found == {"weights_sha256": weights["deterministic"], "other_weights_after_kill": {}}


def test_a_study_that_ends_before_it_is_killed_fails_the_part(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Check, "study", lambda *arguments: python(""))
    with pytest.raises(FailedError, match="the study ended with 0 before it was killed"):
        check_gpu.check_deterministic(check, {})


def test_the_whole_study_is_told_from_the_paces_of_what_has_run(check: Check) -> None:
    plan = {"large": {"epochs": 10}, "arms": {"finetune": {"epochs": 4}, "scratch_e": {"epochs": 10}}}
    (check.out / "paper").mkdir()
    (check.out / "paper/plan.json").write_text(json.dumps(plan))

    def write(stage: str, title: str, seconds: list[float]) -> None:
        folder = check.work / "paper/stages" / stage
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"title": title}))
        rows = [f"{epoch},{10.0 * epoch},{value}" for epoch, value in enumerate(seconds, 1)]
        (folder / "metrics.csv").write_text("\n".join(["epoch,test_top1,seconds", *rows]) + "\n")

    assert check_gpu.progress_of(check, "paper")["training_seconds_of_all"] is None
    write("large-1", "large", [8.0, *(8.0 + 2.0 * epoch for epoch in range(1, 10))])
    write("finetune-2", "finetune", [3.0, 4.0])
    found = check_gpu.progress_of(check, "paper")
    assert found["training_seconds_of_all"] == (8 + 9 * 2) + (4 + 2 * 1) + 10 * 2
    assert found["progress"]["finetune"] == {"epoch": 2, "epochs": 4, "seconds_per_epoch": 1.0, "top1": 20.0}
    assert found["progress"]["scratch_e"] == {"epoch": 0, "epochs": 10, "seconds_per_epoch": None, "top1": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--parts=machine,speed"], "argument --parts: speed: must be of machine, tests, default"),
        (["--minutes=0"], "argument --minutes: 0: must be more than 0"),
        (["--images=."], "argument --images: .: must hold the folders train and test"),
        (["--device=tpu"], "argument --device: invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "out", *arguments])
    with pytest.raises(SystemExit):
        check_gpu.parse_arguments()
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_benchmarks_have_the_options_that_they_are_given(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = check_gpu.SIZES[device]
    for part in ("train", "pruners", "evaluate"):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", part, *getattr(sizes, part)])
        benchmark.parse_arguments()


def test_an_earlier_check_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "check.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        check_gpu.parse_arguments()
    assert "holds an earlier check.json; give another folder" in capsys.readouterr().err


def test_tests_that_need_a_gpu_are_found_by_their_mark() -> None:
    """One that skips itself in another way would never run on a GPU."""
    by_hand = "skipif(not torch.cuda" + ".is_available()"
    assert [str(file) for file in (ROOT / "tests").rglob("test_*.py") if by_hand in file.read_text()] == []


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ROOT / "scripts/check_gpu.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_the_device_ends_the_check(tmp_path: Path) -> None:
    process = start("out", cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "device=cuda: no such CUDA device; this machine has 0" in output
    parts = json.loads((tmp_path / "out/check.json").read_text())["parts"]
    assert parts.pop("machine")["state"] == "failed"
    assert {record["state"] for record in parts.values()} == {"left out"}


@pytest.mark.slow
def test_a_signal_ends_the_part_under_way_and_keeps_what_is_known(tmp_path: Path) -> None:
    process = start("out", "--device=cpu", "--parts=default,cost", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/default/plan.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    parts = json.loads((tmp_path / "out/check.json").read_text())["parts"]
    assert {name: record["state"] for name, record in parts.items()} == {"default": "stopped", "cost": "left out"}
    assert "Traceback" not in output


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(16):
        folder = tmp_path / "images" / ("train", "test")[number % 2] / ("cat", "dog")[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    names = [part.name for part in check_gpu.parts_for("cpu") if part.name != "resnet56"]  # that is as vgg16
    process = start("out", "--device=cpu", "--images=images", f"--parts={','.join(names)}", cwd=tmp_path)
    output, _ = process.communicate(timeout=540)
    out = tmp_path / "out"
    parts = json.loads((out / "check.json").read_text())["parts"]
    assert {name: record["state"] for name, record in parts.items()} == dict.fromkeys(names, "done"), output
    assert process.returncode == 0

    assert parts["machine"]["torch"] == torch.__version__
    assert "skipped" in parts["tests"]["summary"] or "passed" in parts["tests"]["summary"]
    assert set(parts["default"]["trainings"]) == {"large", "finetune", "scratch_e", "scratch_b"}
    assert len(parts["deterministic"]["weights_sha256"]) == 5
    assert "fp32" in {line["what"] for line in parts["vgg16"]["lines"]}
    assert {line["what"] for line in parts["pruners"]["lines"]} == {"l1", "l1, added to the peak"}
    assert "recorded / not, fp32" in {line["what"] for line in parts["evaluate"]["lines"]}
    assert parts["cost"]["speedup"]["1"]["median"] > 0

    paper = parts["paper"]
    assert paper["stopped"]
    assert {title: training["epochs"] for title, training in paper["progress"].items()} == {
        "large": 160,
        "finetune": 40,
        "scratch_e": 160,
        "scratch_b": 243,
    }
    with (out / "l1_vgg16_cifar10/metrics/large.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 0 < len(rows) == paper["progress"]["large"]["epoch"] < 160
    assert json.loads((out / "l1_vgg16_cifar10/summary.json").read_text())["study"]["model"] == "vgg16"
    assert "SIGINT in large" in (out / "paper.log").read_text()
    assert paper["training_seconds_of_all"] > float(rows[-1]["seconds"])
