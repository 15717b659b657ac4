"""Arms, and whole studies of a sweep, that train at once in one process give what each alone does."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import SMALL, command
from rethink_prune.commands import packing
from rethink_prune.errors import UserError
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.together import MOST_AT_ONCE, NeedsDevice, arms_at_once, train_together
from rethink_prune.turns import do_in_turns, number_at_once, pass_turn

CPU = torch.device("cpu")
ARMS = "arms=[finetune,scratch_e,scratch_b]"


def weights(store: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in store.glob("stages/*/model.safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the weights of every stage of two studies whose trainings ran one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    # By a command, too: the bits depend on how many threads a process has.
    done = command("-m", *SMALL, ARMS, "pruner.ratio=0.3,0.5", cwd=folder)
    assert done.returncode == 0, done.stderr
    return weights(folder / "store")


def test_arms_that_train_at_once_end_with_the_same_bits(
    small_study: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    small_study(ARMS)
    summary = small_study(ARMS, "together=3", f"store.root={tmp_path / 'together'}")
    assert weights(tmp_path / "store") == weights(tmp_path / "together")
    assert list(summary["arms"]) == ["finetune", "scratch_e", "scratch_b"]
    assert {entry["together"] for entry in summary["arms"].values()} == {3}
    assert "together" not in summary["large"]
    assert "unfinished" not in summary
    assert "up to 3 trainings shared the device" in (tmp_path / "run2/summary.md").read_text()


@pytest.mark.slow
def test_studies_of_a_sweep_that_train_at_once_end_with_the_same_bits(alone: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", *SMALL, ARMS, "pruner.ratio=0.3,0.5,1.5", "launcher=local", "together=2", "hydra.sweep.dir=sweep"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 3 jobs failed" in done.stderr
    assert weights(tmp_path / "store") == alone
    outcomes = [json.loads((tmp_path / f"sweep/{job}/outcome.json").read_text()) for job in range(3)]
    assert [outcome["state"] for outcome in outcomes] == ["done", "done", "failed"]
    logs = [(tmp_path / f"sweep/{job}/rethink_prune.log").read_text() for job in range(2)]
    # The large network is trained once; each log tells of its own study alone.
    assert sum("large: an epoch takes" in log for log in logs) <= 1
    assert all("scratch_e: " in log for log in logs)
    assert [name for name in ("#0", "#1") for log in logs if f"[{name}]" in log] == ["#0", "#1"]


STOPPED = """
    import os, signal
    from rethink_prune.__main__ import main
    from rethink_prune.training.step import PlainStep
    plain, calls = PlainStep.__call__, 0

    def counted(*arguments):
        global calls
        calls += 1
        if calls == 15:
            os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
        return plain(*arguments)

    PlainStep.__call__ = counted
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop_by", ["SIGKILL", "SIGTERM"])
def test_arms_that_are_stopped_while_they_train_at_once_go_on(
    stop_by: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    words = [*SMALL, ARMS, "pruner.ratio=0.5", "together=3", "store.checkpoint_seconds=0"]
    # Eight steps of the large network, then two rounds of the three arms, and one step.
    stopped = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STOPPED), *words],
        cwd=tmp_path,
        env={**os.environ, "STOP_BY": stop_by},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    number = signal.Signals[stop_by]
    assert stopped.returncode == (-number if stop_by == "SIGKILL" else 128 + number), stopped.stderr
    unfinished = [folder for folder in (tmp_path / "store/stages").iterdir() if list(folder.glob("checkpoint-*"))]
    assert len(unfinished) == 3, "each of the arms keeps its own state"
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = weights(tmp_path / "store")
    assert len(found) == 5
    assert found == {name: alone[name] for name in found}


def test_a_training_that_fails_leaves_the_others_alone() -> None:
    seen: list[str] = []

    def training(name: str, fails: Exception | None = None) -> Callable[[], None]:
        def work() -> None:
            for _ in range(3):
                pass_turn()
            if fails is not None:
                raise fails
            seen.append(name)

        return work

    works = [training("a", UserError("a is gone")), training("b"), training("c")]
    with pytest.raises(UserError, match="a is gone"):
        train_together(works, at_once=3, device=CPU)
    assert seen == ["b", "c"]


def test_a_training_without_room_beside_others_is_done_again_alone(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def large() -> int:
        pass_turn()
        tried.append(number_at_once())
        if number_at_once() > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    assert train_together([large, lambda: 2], at_once=2, device=CPU) == [1, 2]
    assert tried == [2, 1]
    assert "not beside others, going on alone: CUDA out of memory" in caplog.text


def test_what_cannot_share_the_device_goes_on_alone_after_the_others() -> None:
    ended: list[str] = []

    def streamed() -> None:
        if number_at_once() > 1:
            raise NeedsDevice("images are read from files")
        ended.append("streamed")

    def other() -> None:
        pass_turn()
        ended.append("other")

    train_together([streamed, other, other], at_once=2, device=CPU)
    assert ended == ["other", "other", "streamed"]


def test_a_pack_keeps_each_jobs_log_apart_in_the_process_that_ran_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.FileHandler(tmp_path / "last.log")])  # as Hydra leaves it
    monkeypatch.setattr(root, "level", logging.INFO)

    def run_study(config: object, folder: Path, *arguments: object, **options: object) -> None:
        def arm() -> None:
            logging.getLogger("rethink_prune").info("an arm of %s", folder.name)

        do_in_turns([arm], at_once=1)  # in a thread of its own

    monkeypatch.setattr(packing, "run_study", run_study)
    monkeypatch.setattr(packing, "check_config", lambda plain: plain)
    study = {"device": "cpu", "precision": "fp32", "deterministic": False, "together": 2}
    jobs = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        jobs.append({"job": number, "overrides": [], "study": study, "experiment": None, "folder": folder})
    packing.run_packed(jobs)
    for number in range(3):
        (line,) = (tmp_path / str(number) / "rethink_prune.log").read_text().splitlines()
        assert f"[#{number}]" in line
        assert line.endswith(f"an arm of {number}")
    assert (tmp_path / "last.log").read_text() == ""


def test_a_pack_whose_device_is_not_there_fails_job_by_job(tmp_path: Path) -> None:
    study = {"device": "cuda:99", "precision": "fp32", "deterministic": False, "together": 2}
    packing.run_packed([{"job": 7, "overrides": ["seed=1"], "study": study, "experiment": None, "folder": tmp_path}])
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["state"], outcome["overrides"]) == ("failed", ["seed=1"])
    assert outcome["reason"].startswith("device=cuda:99: no such CUDA device")


class _Batches:
    """Stands for batches of images that are kept on the device."""

    images = None


def test_arms_train_at_once_on_a_gpu_and_where_it_is_asked_for() -> None:
    batches: Any = _Batches()
    several = Processes(rank=0, world=2, local_rank=0, local_world=2)
    cuda = torch.device("cuda")
    assert arms_at_once("auto", cuda, ALONE, batches) == MOST_AT_ONCE
    assert arms_at_once("auto", CPU, ALONE, batches) == 1
    assert arms_at_once("auto", cuda, several, batches) == 1
    assert arms_at_once(3, CPU, ALONE, batches) == 3
    with pytest.raises(UserError, match=r"^together=3: torchrun's processes train one network at a time"):
        arms_at_once(3, CPU, several, batches)
