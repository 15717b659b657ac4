"""Real processes started by torchrun, over gloo: the results of one process, and what happens when one dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness import SMALL, command
from rethink_prune.store.metrics import read_metrics

# Without batch norm, whose statistics are those of each process's part of a batch. One layer takes no part in the loss.
NETWORK = """
    from torch import nn

    class Plain(nn.Module):
        def __init__(self, num_classes, in_channels):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            )
            self.unused = nn.Linear(3, 3)
            self.classifier = nn.Linear(16, num_classes)

        def forward(self, x):
            return self.classifier(self.features(x).flatten(1))
"""
# 70 and 50 images: the last batch of an epoch has 6, and two processes evaluate 25 each.
PLAIN = [
    *("model.name=nets:Plain", "model.init=reset_parameters", "pruner.ratio=0.5", "dataset.image_size=8"),
    *("dataset.train_limit=70", "dataset.test_limit=50", "recipe.batch_size=16", "recipe.epochs=3"),
    *("recipe.finetune.epochs=1", "recipe.lr=0.05", "precision=fp32", "device=cpu", "store.checkpoint_seconds=0"),
    # The teacher's weights, too, have to reach every process.
    "arms=[finetune,scratch_e,scratch_b,scratch_kd@2]",
]

# Runs the command line with something of one process changed.
SCRIPT = """
    import os, signal, sys, time
    from datetime import timedelta
    import torch
    from rethink_prune.store import stage, store
    from rethink_prune.__main__ import main
    from rethink_prune.training import distributed, step

    rank = int(os.environ["RANK"])
    exec(os.environ["CHANGE"])
    sys.argv[0] = "rethink_prune"
    main()
"""
# The first process alone touches the store.
ONLY_FIRST = """
def refuse(*arguments, **options):
    raise AssertionError("touched the store")
if rank > 0:
    for name in ("prepare", "stage", "record_run"):
        setattr(store.Store, name, refuse)
    for name in ("status", "result", "hold", "begin", "finish"):
        setattr(stage.Stage, name, refuse)
"""
KILL = """
calls, plain = 0, step.PlainStep.__call__
def dying(*arguments):
    global calls
    calls += 1
    if calls == 12 and rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
step.PlainStep.__call__ = dying
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETWORK))
    (tmp_path / "changed.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path


def torchrun(
    folder: Path, *arguments: str, change: str | None = None, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run the command line by ``torchrun``, perhaps changed."""
    with started(folder, *arguments, change=change, processes=processes) as process:
        output, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def started(folder: Path, *arguments: str, change: str | None = None, processes: int = 2) -> subprocess.Popen[str]:
    what = ["-m", "rethink_prune"] if change is None else ["changed.py"]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *what,
            *arguments,
        ],
        cwd=folder,
        env={
            **os.environ,
            "CHANGE": change or "",
            "PYTHONPATH": os.pathsep.join([".", *sys.path]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def summary(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / "summary.json").read_text())


def rows(entry: dict[str, Any]) -> list[dict[str, float]]:
    """Return an entry's rows, without what was measured by a clock or says how many processes there were."""
    rows = read_metrics(Path(entry["stage"]))
    return [{name: value for name, value in row.items() if name not in ("seconds", "processes")} for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The study of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "nets.py").write_text(textwrap.dedent(NETWORK))
    done = command(*PLAIN, "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return summary(folder, "run")


def check_like_alone(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Sums in another order differ by rounding errors, which training lets grow; counts do not."""
    for name in ("large", "finetune", "scratch_e", "scratch_b", "scratch_kd@2"):
        here, there = (study["large"] if name == "large" else study["arms"][name] for study in (found, alone))
        assert len(rows(here)) == len(rows(there))
        for ours, theirs in zip(rows(here), rows(there), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4)
            assert ours["images"] == 70
        assert here["stage"].split("/")[-1] == there["stage"].split("/")[-1]  # the key does not know of processes
    assert found["pruned"]["layers"] == alone["pruned"]["layers"]


def test_two_processes_have_the_results_of_one(folder: Path, alone: dict[str, Any]) -> None:
    done = torchrun(folder, *PLAIN, "hydra.run.dir=run", change=ONLY_FIRST)
    assert done.returncode == 0, done.stdout
    found = summary(folder, "run")
    check_like_alone(found, alone)
    assert {tuple(entry["processes"]) for entry in (found["large"], *found["arms"].values())} == {(2,)}
    assert alone["large"]["processes"] == [1]
    assert {row["processes"] for row in read_metrics(Path(found["large"]["stage"]))} == {2}
    # One run, one table, one line of every message.
    assert [path.name for path in folder.glob("run*")] == ["run"]
    assert done.stdout.count("| fine-tune") <= 1
    assert done.stdout.count("large: ") == done.stdout.count("large: an epoch takes") + 1


@pytest.mark.slow
def test_two_processes_mix_and_augment_as_one(folder: Path) -> None:
    mixed = ("recipe.mixup=0.8", "recipe.cutmix=1", "recipe.rand_augment=9", "arms=[scratch_kd@2]")
    alone = command(*PLAIN, *mixed, "hydra.run.dir=alone", "store.root=alone_store", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(folder, *PLAIN, *mixed, "hydra.run.dir=run")
    assert done.returncode == 0, done.stdout
    (ours, theirs) = (summary(folder, run) for run in ("run", "alone"))
    for name in ("large", "scratch_kd@2"):
        here, there = (study["large"] if name == "large" else study["arms"][name] for study in (ours, theirs))
        for row, other in zip(rows(here), rows(there), strict=True):
            assert row == pytest.approx(other, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_training_which_goes_on_with_any_number(
    folder: Path, alone: dict[str, Any], rank: int
) -> None:
    died = torchrun(folder, *PLAIN, "hydra.run.dir=first", change=KILL.format(rank=rank))
    assert died.returncode != 0
    assert (
        f"process {1 - rank} of 2: another process of this training is gone; nothing finished is lost: "
        "run the same command again, with any number of processes, to go on"
    ) in died.stdout
    (large,) = (folder / "store/stages").glob("large-*")
    before = sorted(path.name for path in large.glob("checkpoint-*"))
    assert before[-1].startswith("checkpoint-000002-000000")  # 5 steps an epoch: killed in the third
    again = command(*PLAIN, "hydra.run.dir=second", cwd=folder)
    assert again.returncode == 0, again.stderr
    found = summary(folder, "second")
    check_like_alone(found, alone)
    assert found["large"]["processes"] == [1, 2]


@pytest.mark.slow
def test_signal_to_torchrun_saves_and_the_same_command_goes_on(folder: Path, alone: dict[str, Any]) -> None:
    slow = """
plain = step.PlainStep.__call__
step.PlainStep.__call__ = lambda *arguments: (time.sleep(0.3), plain(*arguments))[1]
"""
    with started(folder, *PLAIN, "store.checkpoint_seconds=60", "hydra.run.dir=first", change=slow) as process:
        wait_until(lambda: list(folder.glob("store/stages/large-*/metrics.csv")))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"SIGTERM in large, epoch \d of 3: saved; run the same command again to go on", output), output
    (status,) = folder.glob("store/stages/large-*/status.json")
    assert json.loads(status.read_text())["state"] == "stopped"
    again = torchrun(folder, *PLAIN, "hydra.run.dir=second")
    assert again.returncode == 0, again.stdout
    check_like_alone(summary(folder, "second"), alone)


@pytest.mark.slow
def test_waiting_for_another_job_is_not_a_collective(folder: Path, alone: dict[str, Any]) -> None:
    # The others wait for longer than a collective may take here.
    change = "distributed._TIMEOUT = timedelta(seconds=5)"
    large = folder / "store/stages" / Path(alone["large"]["stage"]).name
    large.mkdir(parents=True)
    with FileLock(large / "lock"):
        process = started(folder, *PLAIN, "hydra.run.dir=run", "arms=[finetune]", change=change)
        wait_until(lambda: (folder / "run/plan.json").exists())
        time.sleep(8)
        assert process.poll() is None
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "waiting for large-" in output


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["sss", "magnitude"])
def test_batch_norms_masks_and_sparse_training_are_shared(folder: Path, pruner: str) -> None:
    target = {"sss": "pruner.sparse.strength=10", "magnitude": "pruner.ratio=0.4"}[pruner]
    rewound = ("rewind.epoch=1", "arms=[finetune,weight_rewind,lr_rewind]")
    done = torchrun(folder, *SMALL, f"pruner={pruner}", target, *rewound, "hydra.run.dir=run")
    assert done.returncode == 0, done.stdout
    found = summary(folder, "run")
    for entry in (found["sparse"] if pruner == "sss" else found["large"], found["early"], *found["arms"].values()):
        assert entry["processes"] == [2]
        assert 0 <= entry["top1"] <= 100


@pytest.mark.slow
def test_an_arm_that_diverges_fails_alone(folder: Path) -> None:
    done = torchrun(folder, *PLAIN, "recipe.finetune.lr=1e30", "arms=[finetune,scratch_e]", "hydra.run.dir=run")
    assert done.returncode != 0
    assert done.stdout.count("finetune failed: the training loss became") >= 1
    assert "Traceback" not in done.stdout.split("torch/distributed/elastic", 1)[0]
    arms = summary(folder, "run")["arms"]
    assert (arms["finetune"]["status"], arms["scratch_e"]["status"]) == ("failed", "done")


@pytest.mark.slow
def test_one_process_of_torchrun_is_an_ordinary_study(folder: Path) -> None:
    done = torchrun(folder, *PLAIN, "hydra.run.dir=run", "arms=[scratch_e]", processes=1)
    assert done.returncode == 0, done.stdout
    assert summary(folder, "run")["arms"]["scratch_e"]["processes"] == [1]


@pytest.mark.slow
def test_sweep_under_torchrun_is_refused(folder: Path) -> None:
    done = torchrun(folder, "-m", "seed=0,1")
    assert done.returncode != 0
    message = (
        "-m: torchrun starts one study; start it once for every study, or run the sweep without it: "
        "python -m rethink_prune -m ..."
    )
    assert done.stdout.count(message) == 1
    assert not (folder / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["dry_run=true"], ["seed=-1"]])
def test_what_trains_nothing_ends_all_processes(folder: Path, arguments: list[str]) -> None:
    done = torchrun(folder, *PLAIN, *arguments)
    assert (done.returncode != 0) == (arguments == ["seed=-1"])
    if arguments == ["seed=-1"]:
        assert done.stdout.count("seed=-1: must be greater") == 1
    assert "is gone" not in done.stdout


def by_hand(folder: Path, rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    """Start one process with the variables that torchrun sets, as other launchers do."""
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "rethink_prune", *arguments],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_with_different_arguments_are_refused(folder: Path, port: int) -> None:
    arguments = [*PLAIN, "arms=[scratch_e]", "hydra.run.dir=run"]
    first, second = by_hand(folder, 0, port, *arguments), by_hand(folder, 1, port, *arguments, "recipe.lr=0.1")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert output.strip() == (
        "process 1 of 2 was started with other arguments than the first one: "
        f"'{' '.join([*arguments, 'recipe.lr=0.1'])}' here, '{' '.join(arguments)}' there; "
        "start all of them in the same way"
    )
    first.kill()
    first.communicate(timeout=60)


def test_port_in_use_is_told(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        process = by_hand(folder, 0, taken.getsockname()[1], *PLAIN)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("MASTER_PORT=")]
    assert re.search(r"cannot be used on this machine \(.*\); choose a free port: torchrun --master-port", line)
