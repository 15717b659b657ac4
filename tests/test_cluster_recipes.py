"""The recipes of ``scripts/cluster``: what a cluster would run is run here, on one machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from harness import SMALL

RECIPES = Path(__file__).parents[1] / "scripts" / "cluster"
TINY = " ".join([*SMALL, "arms=[scratch_e]"])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which ``python`` is the tests' own, and ``scontrol`` writes down what it is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
def test_a_task_of_the_array_runs_its_line_saves_before_its_time_limit_and_goes_on(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "studies.txt").write_text(f"pruner.ratio=7\n{TINY} recipe.epochs=40 store.checkpoint_seconds=1000\n")
    words = ["bash", RECIPES / "array.sbatch", "studies.txt"]
    task = {**environment, "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "12"}
    first = subprocess.Popen(words, cwd=tmp_path, env=task)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("metrics.csv")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)
    first.wait(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"
    assert list(tmp_path.rglob("checkpoint*"))

    again = subprocess.run(words, cwd=tmp_path, env=task, timeout=120, check=False)
    assert again.returncode == 0
    (metrics,) = tmp_path.rglob("metrics.csv")
    epochs = [line.split(",")[0] for line in metrics.read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, 41)]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (["studies.txt"], "studies.txt has no line 8 for task 7"),
        (["nowhere.txt"], "nowhere.txt has no line 8 for task 7"),
        ([], "give the file with the studies"),
    ],
)
def test_a_task_of_the_array_without_a_line_runs_nothing(
    file: list[str], said: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "studies.txt").write_text("dry_run=true\n")
    task = {**environment, "SLURM_ARRAY_TASK_ID": "7"}
    words = ["bash", str(RECIPES / "array.sbatch"), *file]
    done = subprocess.run(words, cwd=tmp_path, env=task, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_study_on_two_machines(tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    lines = re.findall(r"^torchrun (.*) \.\.\.$", (RECIPES / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) == 2
    machines = []
    for line in lines:
        options = line.replace("HOST:29500", address).replace("--nproc-per-node=8", "--nproc-per-node=1")
        words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(f"{options} {TINY}")]
        machines.append(subprocess.Popen(words, cwd=tmp_path, env=environment))
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    assert [row[header.index("processes")] for row in rows] == ["2", "2"]
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def test_the_skypilot_task_runs_one_study_with_the_store_on_the_shared_disk(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert task["envs"]["SHARED"] in task["volumes"]
    overrides = {"OVERRIDES": f"{TINY} seed=3", "SHARED": str(tmp_path / "shared disk")}
    assert overrides.keys() == task["envs"].keys()
    (tmp_path / "shared disk").mkdir()
    elsewhere = tmp_path / "workdir"
    elsewhere.mkdir()
    subprocess.run(
        ["bash", "-c", task["run"]], cwd=elsewhere, env={**environment, **overrides}, timeout=120, check=True
    )
    (summary,) = (tmp_path / "shared disk/runs").rglob("summary.json")
    assert json.loads(summary.read_text())["study"]["seed"] == 3
    assert len(list((tmp_path / "shared disk/store/stages").iterdir())) == 1
    assert list(elsewhere.iterdir()) == []
