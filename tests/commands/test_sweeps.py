"""Multiruns on every launcher that is installed: failures, GPUs, repetitions, batch systems."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import OmegaConf

from harness import SMALL, command
from rethink_prune.commands.sweeps import (
    MOST_DEATHS,
    choose_device,
    job_device,
    record_outcome,
    refuse_after_deaths,
)

# One stage, as short as can be.
TINY = [*SMALL, "recipe.epochs=1", "arms=[scratch_e]"]
WRONG = "pruner.ratio=7: must be in (0, 1), the share to remove"


def needs(plugin: str, extra: str) -> pytest.MarkDecorator:
    """Skip a test where the package of a launcher is missing."""
    missing = find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(missing, reason=f'{plugin} is not installed: pip install "rethink-prune[{extra}]"')


def tops(cwd: Path) -> list[float]:
    """Return what the arms of all finished runs reached."""
    summaries = [json.loads(path.read_text()) for path in cwd.rglob("summary.json")]
    return [entry["top1"] for summary in summaries for entry in summary["arms"].values() if entry["status"] == "done"]


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "gpus", "device"), [(0, 0, "auto"), (5, 0, "auto"), (0, 2, "cuda:0"), (3, 2, "cuda:1"), (8, 4, "cuda:0")]
)
def test_jobs_take_gpus_in_turns(number: int, gpus: int, device: str) -> None:
    assert job_device(number, gpus) == device


def test_only_jobs_of_joblib_choose_a_gpu_and_only_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def chosen(device: str, launcher: str, mode: RunMode = RunMode.MULTIRUN) -> str:
        run = OmegaConf.structured(HydraConf)
        run.mode, run.runtime.choices, run.job.num = mode, {"hydra/launcher": launcher}, 3
        return choose_device(device, run)

    assert chosen("auto", "joblib") == "cuda:1"
    assert chosen("cpu", "joblib") == "cpu"
    assert chosen("cuda:0", "joblib") == "cuda:0"
    assert chosen("auto", "submitit_slurm") == "auto", "a batch system shows a job only its own"
    assert chosen("auto", "basic") == "auto"
    assert chosen("auto", "joblib", RunMode.RUN) == "auto"


@pytest.mark.slow
def test_failed_jobs_are_listed_and_only_what_is_missing_is_done_again(tmp_path: Path) -> None:
    folder = "hydra.sweep.dir=sweep"
    first = command("-m", *TINY, folder, "pruner.ratio=7,0.5", "recipe.lr=0.1,1e30", cwd=tmp_path)
    assert first.returncode == 1
    assert "Traceback" not in first.stdout + first.stderr
    lines = first.stderr.splitlines()
    assert lines[0] == "3 of 4 jobs failed; the same command again does only what is missing:"
    jobs, reasons = lines[1::2], lines[2::2]
    assert [line.split()[0] for line in jobs] == ["#0", "#1", "#3"]
    assert [line.split()[-2:] for line in jobs] == [
        ["pruner.ratio=7", "recipe.lr=0.1"],
        ["pruner.ratio=7", "recipe.lr=1e+30"],
        ["pruner.ratio=0.5", "recipe.lr=1e+30"],
    ]
    assert reasons[:2] == [f"    {WRONG}"] * 2
    assert reasons[2].startswith("    scratch_e failed: the training loss became")
    assert f"job 0 failed: {WRONG}" in first.stdout, "at once, not only in the end"
    assert len(tops(tmp_path)) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/stages").glob("*/status.json")}

    again = command("-m", *TINY, folder, "pruner.ratio=0.5", "recipe.lr=0.1,1e30", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("1 of 2 jobs failed"), "not those of before"
    done = [path for path in before if json.loads(path.read_text())["state"] == "done"]
    assert len(done) == 1
    assert done[0].stat().st_mtime_ns == before[done[0]], "what is done is not touched"
    failed = [path for path in before if path not in done]
    assert failed
    assert all(path.stat().st_mtime_ns > before[path] for path in failed), "what failed is tried again"


def test_a_launcher_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    if find_spec("ray") is not None:
        pytest.skip("all launchers are installed")
    result = command("-m", "launcher=ray", "seed=0,1", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        'launcher=ray: needs hydra-ray-launcher; install it with pip install "rethink-prune[ray]"\n'
    )


@needs("hydra_submitit_launcher", "launchers")
def test_slurm_away_from_a_cluster_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rethink_prune", "-m", "launcher=slurm", "seed=0,1"],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == ("launcher=slurm: there is no srun here; start it on a machine of the Slurm cluster\n")


@needs("hydra_joblib_launcher", "launchers")
@pytest.mark.slow
def test_local_processes(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        textwrap.dedent("""
            from rethink_prune import build_model

            def good(num_classes, in_channels):
                return build_model("resnet20", num_classes=num_classes, in_channels=in_channels)

            def refuse(model, inputs):
                if model.training and len(inputs[0]) > 2:  # more images than are tried before training
                    raise RuntimeError("a bug")

            def late(num_classes, in_channels):
                model = good(num_classes, in_channels)
                model.register_forward_pre_hook(refuse)
                return model
        """)
    )
    arguments = ["launcher=local", "hydra.launcher.n_jobs=2", *TINY, "model.name=nets:late,nets:good"]
    result = command("-m", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    failed, job, reason = result.stderr.splitlines()
    assert failed.startswith("1 of 2 jobs failed")
    assert job.startswith("#0 launcher=local")
    assert job.endswith(":late")
    assert reason == "    RuntimeError: a bug"
    assert "Traceback" in result.stdout, "of what no user can put right, in the log"
    assert len(tops(tmp_path)) == 1


@needs("hydra_joblib_launcher", "launchers")
@pytest.mark.slow
def test_a_job_whose_process_was_killed_is_listed(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import os\ndef build(num_classes):\n    os.kill(os.getpid(), 9)\n")
    result = command("-m", "launcher=local", "hydra.launcher.n_jobs=2", *TINY, "model.name=nets:build", cwd=tmp_path)
    assert result.returncode == 1
    assert "1 of 1 jobs failed" in result.stderr
    assert "ended without a word (killed, or out of memory?)" in result.stderr


@pytest.mark.slow
@needs("hydra_joblib_launcher", "launchers")
def test_a_signal_ends_the_processes(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rethink_prune", "-m", "launcher=local", *TINY, "recipe.epochs=1000", "seed=0,1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(tmp_path.rglob("metrics.csv")), process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.startswith("SIGTERM: run the same command again to go on\n")
    assert "Traceback" not in errors
    for status in tmp_path.glob("store/stages/*/status.json"):
        with pytest.raises(ProcessLookupError):
            os.kill(json.loads(status.read_text())["pid"], 0)


@pytest.mark.slow
@needs("hydra_submitit_launcher", "launchers")
def test_a_preempted_job_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """Submitit's executor for one machine requeues as its executor for Slurm does, on the same signal."""
    arguments = [*TINY, "recipe.epochs=60", "store.checkpoint_seconds=1000", "pruner.ratio=7,0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rethink_prune", "-m", "hydra/launcher=submitit_local", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(tmp_path.rglob("metrics.csv")), process)
    (metrics,) = tmp_path.rglob("metrics.csv")
    os.kill(json.loads((metrics.parent / "status.json").read_text())["pid"], signal.SIGUSR2)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert [line.strip() for line in errors.splitlines()[2:]] == [WRONG]
    assert len(tops(tmp_path)) == 1
    logs = [path.read_text() for path in tmp_path.rglob("*_log.out")]
    (log,) = [text for text in logs if "SIGUSR2" in text]
    assert "saved; run the same command again to go on" in log
    assert log.count("Starting with JobEnvironment") == 2
    epochs = [line.split(",")[0] for line in metrics.read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, 61)]


SBATCH = """\
#!/bin/bash
# Runs the tasks of an array at once, on this machine, as sbatch has a cluster do. Like sbatch it keeps the script:
# submitit moves its own away as soon as this ends.
cp "$1" "$SUBMITTED"
for task in 0 1; do
    export SLURM_JOB_ID=$((100 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task
    bash "$SUBMITTED" > "$SUBMITTED.$task" 2>&1 &
done
echo "Submitted batch job 7"
"""
SRUN = """\
#!/bin/bash
# srun --unbuffered --output FILE --error FILE COMMAND...
exec "${@:6}"
"""


@needs("hydra_submitit_launcher", "launchers")
@pytest.mark.slow
def test_jobs_of_a_slurm_cluster(tmp_path: Path) -> None:
    """Only ``sbatch`` and ``srun`` stand in for Slurm: what is submitted is what a cluster would be given, and runs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SUBMITTED": str(tmp_path / "submitted"),
    }
    arguments = [*TINY, "dry_run=true", "pruner.ratio=7,0.5", "hydra.launcher.partition=short"]
    result = subprocess.run(
        [sys.executable, "-m", "rethink_prune", "-m", "launcher=slurm", *arguments, "hydra.launcher.timeout_min=30"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    failed, job, reason = result.stderr.splitlines()[-3:]  # after what submitit says of sacct
    assert failed.startswith("1 of 2 jobs failed")
    assert job.startswith("#0 ")
    assert reason == f"    {WRONG}"
    assert len(list(tmp_path.rglob("plan.json"))) == 1
    submitted = (tmp_path / "submitted").read_text()
    for option in ("partition=short", "time=30", "mem=16GB", "gpus-per-node=1", "array=0-1%2", "signal=USR2@120"):
        assert f"#SBATCH --{option}\n" in submitted


@needs("hydra_ray_launcher", "ray")
def test_jobs_on_ray(tmp_path: Path) -> None:
    # Not on a cluster that runs here for another test.
    local = "hydra.launcher.ray.init.address=local"
    result = command("-m", "launcher=ray", local, *TINY, "pruner.ratio=7,0.5", cwd=tmp_path)
    assert result.returncode == 1
    failed, job, reason = result.stderr.splitlines()[-3:]
    assert failed.startswith("1 of 2 jobs failed")
    assert job.startswith("#0 launcher=ray")
    assert reason == f"    {WRONG}"
    assert len(tops(tmp_path)) == 1


@pytest.mark.slow
@needs("hydra_ray_launcher", "ray")
def test_a_machine_of_a_ray_cluster_that_dies(tmp_path: Path) -> None:
    """Two machines with a job each: when one dies, its job goes on on the other one, and nothing is done twice."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    psutil = pytest.importorskip("psutil")
    noticed_soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed_soon}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        address = f"hydra.launcher.ray.init.address={cluster.address}"
        arguments = ["-m", "launcher=ray", address, *TINY, "recipe.epochs=40,41", "store.checkpoint_seconds=0.1"]
        with (tmp_path / "log").open("w") as log:
            sweep = subprocess.Popen(
                [sys.executable, "-m", "rethink_prune", *arguments, "hydra.sweep.dir=sweep"],
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        wait_for(lambda: list(tmp_path.rglob("checkpoint*")), sweep)
        stage = next(tmp_path.rglob("checkpoint*")).parent
        worker = psutil.Process(json.loads((stage / "status.json").read_text())["pid"])
        machine = worker.parent()
        for process in [machine, *machine.children(recursive=True)]:
            process.kill()
        assert sweep.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        outcomes = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("sweep/*/outcome.json"))]
        assert sorted(outcome.get("deaths", 0) for outcome in outcomes) == [0, 1]
        assert {outcome["state"] for outcome in outcomes} == {"done"}
        files = sorted(tmp_path.glob("store/stages/*/metrics.csv"))
        epochs = [[line.split(",")[0] for line in file.read_text().splitlines()[1:]] for file in files]
        assert sorted(map(len, epochs)) == [40, 41]
        assert all(found == [str(epoch) for epoch in range(1, len(found) + 1)] for found in epochs)

        before = [file.stat().st_mtime_ns for file in files]
        again = command(*arguments, "hydra.sweep.dir=again", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert [file.stat().st_mtime_ns for file in files] == before
        assert len(tops(tmp_path)) == 4
    finally:
        cluster.shutdown()


def test_a_job_that_dies_again_and_again_on_ray_fails_and_ends_no_other(tmp_path: Path) -> None:
    run = OmegaConf.structured(HydraConf)
    run.mode, run.runtime.choices, run.runtime.output_dir = RunMode.MULTIRUN, {"hydra/launcher": "ray"}, str(tmp_path)
    run.job.num, run.overrides.task = 4, ["seed=4"]
    died = {"job": 4, "overrides": ["seed=4"], "state": "running"}
    found = []
    for deaths in range(MOST_DEATHS):
        (tmp_path / "outcome.json").write_text(json.dumps({**died, "deaths": deaths}))
        with record_outcome(run) as outcome:
            refuse_after_deaths(outcome)
        ended = json.loads((tmp_path / "outcome.json").read_text())
        found.append((ended["state"], ended["deaths"], ended.get("reason")))
    reason = "its process or machine died 3 times (killed, or out of memory?)"
    assert found == [("done", 1, None), ("done", 2, None), ("failed", 3, reason)]
