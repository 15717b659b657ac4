"""Real processes, really killed: the same command goes on and ends with the same bits."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import SMALL

ARGUMENTS = [*SMALL, "recipe.epochs=3", "arms=[finetune,scratch_e,retrain_kd@2]", "store.checkpoint_seconds=0"]
IN_ROUNDS = [*ARGUMENTS, "arms=[lottery]", "rewind.epoch=1", "pruner.rounds=2", "pruner.between_rounds=epoch"]

# Runs the command line with something that kills it inserted at a given point.
KILLER = """
    import os, signal, sys
    import rethink_prune.files, rethink_prune.store.stage
    import rethink_prune.training.checkpoint, rethink_prune.training.step
    from rethink_prune.__main__ import main

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    point, count = sys.argv.pop(1), int(sys.argv.pop(1))
    calls = 0

    def after(count, function, act):
        def wrapped(*args, **kwargs):
            global calls
            calls += 1
            if calls == count:
                act(*args)
            return function(*args, **kwargs)
        return wrapped

    def half_written(path, content):
        (path.parent / f".{path.name}-half.tmp").write_bytes(bytes(content)[: len(content) // 2])
        die()

    checkpoint, store = rethink_prune.training.checkpoint, rethink_prune.store.stage
    step = rethink_prune.training.step.PlainStep
    if point == "step":
        step.__call__ = after(count, step.__call__, lambda *args: die())
    if point == "checkpoint":
        checkpoint.write_atomically = after(count, checkpoint.write_atomically, half_written)
    if point == "finish":
        store.Stage.finish = after(count, store.Stage.finish, lambda *args: die())
    if point == "slow":
        import time
        step.__call__ = after(count, step.__call__, lambda *args: (print("here", flush=True), time.sleep(5)))
    sys.argv[0] = "rethink_prune"
    main()
"""


def start(
    cwd: Path, point: str, count: int, run_dir: str = "run", arguments: Sequence[str] = ARGUMENTS
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLER), point, str(count), *arguments, f"hydra.run.dir={run_dir}"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(cwd: Path) -> dict[str, tuple[bytes, list[dict[str, str]]]]:
    """Return weights and metrics, time columns aside, of every stage."""
    found = {}
    for folder in (cwd / "store/stages").iterdir():
        rows = []
        if (folder / "metrics.csv").exists():
            with (folder / "metrics.csv").open() as file:
                rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        found[folder.name] = ((folder / "model.safetensors").read_bytes(), rows)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, list[dict[str, str]]]]:
    cwd = tmp_path_factory.mktemp("uninterrupted")
    assert start(cwd, "never", 0).wait(120) == 0
    return results(cwd)


# 4 steps an epoch: 12 steps of large, 4 of finetune, 12 of scratch_e, 8 of retrain_kd@2; a checkpoint after each but
# the last.
@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("step", 3),
        pytest.param("step", 9, marks=pytest.mark.slow),
        pytest.param("step", 20, marks=pytest.mark.slow),
        ("step", 33),
        pytest.param("checkpoint", 2, marks=pytest.mark.slow),
        ("checkpoint", 14),
        pytest.param("finish", 1, marks=pytest.mark.slow),
        pytest.param("finish", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_ends_with_the_same_bits(
    point: str, count: int, tmp_path: Path, uninterrupted: dict[str, tuple[bytes, list[dict[str, str]]]]
) -> None:
    killed = start(tmp_path, point, count)
    assert killed.wait(120) == -signal.SIGKILL
    again = start(tmp_path, "never", 0)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert results(tmp_path) == uninterrupted
    assert not list((tmp_path / "store").rglob("*.tmp"))


# 12 steps of large, 4 of its first epoch again, 12 between the rounds, 12 of the ticket.
@pytest.mark.slow
def test_rounds_that_are_killed_end_with_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert start(whole, "never", 0, arguments=IN_ROUNDS).wait(120) == 0
    # Each attempt goes on where the one before was killed: in `early`, between the rounds, and in the ticket.
    for count in (14, 9, 12):
        assert start(broken, "step", count, arguments=IN_ROUNDS).wait(120) == -signal.SIGKILL
    assert start(broken, "never", 0, arguments=IN_ROUNDS).wait(120) == 0
    assert results(broken) == results(whole)
    assert sorted({name.partition("-")[0] for name in results(whole)}) == ["early", "large", "prune", "ticket"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, uninterrupted: dict[str, tuple[bytes, list[dict[str, str]]]]
) -> None:
    process = start(tmp_path, "slow", 6)
    assert process.stdout is not None
    assert "here\n" in process.stdout, "reads up to that line"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert errors == f"{number.name} in large, epoch 2 of 3: saved; run the same command again to go on\n"
    checkpoints = list((tmp_path / "store").rglob("checkpoint-000001-00000002-*.pt"))
    assert len(checkpoints) == 1, "the step was finished and saved"
    assert json.loads((checkpoints[0].parent / "status.json").read_text())["state"] == "stopped"
    assert start(tmp_path, "never", 0).wait(120) == 0
    assert results(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_signal_ends_a_multirun(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rethink_prune", "-m", *ARGUMENTS, "recipe.epochs=100", "seed=0,1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM in large" in errors
    assert "Traceback" not in errors
    assert len(list(tmp_path.rglob("plan.json"))) == 1, "the second job did not start"


@pytest.mark.slow
def test_two_processes_share_one_training(tmp_path: Path) -> None:
    first, second = (start(tmp_path, "never", 0, run_dir) for run_dir in ("run1", "run2"))
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    stages = [json.loads(path.read_text()) for path in (tmp_path / "store/stages").glob("*/status.json")]
    assert len(stages) == 5
    assert all(stage["state"] == "done" for stage in stages)
