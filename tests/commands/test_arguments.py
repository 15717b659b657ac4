"""The command line, in processes of its own: from any folder, with wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import SMALL, command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pruner.ratio=1.2", "recipe.epochs=0"],
            ["pruner.ratio=1.2: must be in (0, 1)", "recipe.epochs=0: must be"],
        ),
        (["model.name=resnet57"], ["model.name=resnet57: no such network"]),
        (["pruner=null"], ["pruner=null: must be one of fpgm, grasp, guided, l1, lamp, magnitude,"]),
        (["device=cuda:9"], ["device=cuda:9: no such CUDA device"]),
        (["dataset=folder", "dataset.root=nowhere"], ["nowhere: no such folder; expected train/"]),
        (["store.root=a_file"], ["a_file: cannot be written"]),
        (["hydra.run.dir=a_file"], ["hydra.run.dir=a_file: a_file is a file; name a folder"]),
    ],
)
def test_wrong_input_ends_with_status_1_and_its_message_alone(
    arguments: list[str], message: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a_file").write_text("precious")
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    # The message, and nothing of Hydra's.
    assert len(result.stderr.splitlines()) == len(message)
    for text in message:
        assert text in result.stderr
    assert (tmp_path / "a_file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"], "nothing is left behind"


@pytest.mark.parametrize("sign", ["", "+"])
def test_a_slip_is_answered_with_one_line_and_the_nearest_names(sign: str, tmp_path: Path) -> None:
    result = command(f"{sign}pruner.ratoi=0.3", "hydra.run.dir=run", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "pruner.ratoi: unknown key; did you mean ratio?\n")


def test_the_traceback_of_a_users_error_is_there_for_those_who_ask(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def build(num_classes):\n    return 1 / 0\n")
    arguments = ("model.name=broken:build", "dry_run=true", "hydra.run.dir=run")
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    found = [command(*arguments, cwd=tmp_path, env=env).stderr for env in (None, environment)]
    assert found[0].count("\n") == 1
    assert "(HYDRA_FULL_ERROR=1 shows where)" in found[0]
    assert "return 1 / 0" in found[1]


def test_users_add_configurations_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/tiny.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: vgg11\npruner:\n  ratio: 0.25\n"
    )
    result = command("--config-dir", "mine", "experiment=tiny", "dry_run=true", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert [layer["kept"] for layer in plan["pruned"]["layers"]][:3] == [48, 96, 192]


def test_the_store_can_be_named_by_an_environment_variable(tmp_path: Path) -> None:
    environment = {**os.environ, "RETHINK_PRUNE_STORE": str(tmp_path / "elsewhere")}
    subprocess.run(
        [sys.executable, "-m", "rethink_prune", *SMALL, "arms=[scratch_e]", "recipe.epochs=1"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert list((tmp_path / "elsewhere/stages").glob("scratch-*"))
    assert not (tmp_path / "store").exists()


def test_help_lists_the_groups(tmp_path: Path) -> None:
    result = command("--help", cwd=tmp_path)
    assert result.returncode == 0
    for group in ("dataset:", "model:", "pruner:", "recipe:", "budget:", "launcher:", "experiment:"):
        assert group in result.stdout


@pytest.mark.parametrize("arguments", ["--help", "--cfg job"])
def test_what_is_printed_need_not_be_read_to_the_end(arguments: str, tmp_path: Path) -> None:
    # `true` is gone long before the first line.
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m rethink_prune {arguments} | true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""


def test_a_signal_does_not_hide_the_error_that_it_follows(tmp_path: Path) -> None:
    """As when one of several processes is gone: the others fail, and torchrun signals them to end."""
    program = """
import os, signal, sys
import rethink_prune.study.run
from rethink_prune.__main__ import main
from rethink_prune.errors import UserError

def failing(*arguments, **options):
    try:
        raise UserError("another process is gone")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

rethink_prune.study.run.run_study = failing
sys.argv = ["rethink_prune"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "another process is gone\n"


def test_paths_are_relative_to_where_the_command_was_started_also_with_chdir(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(
        "from rethink_prune.models.resnet import ResNet\nNet = lambda num_classes: ResNet(8)\n"
    )
    arguments = [*SMALL, "model.name=my_net:Net", "arms=[finetune]", "hydra.job.chdir=true"]
    result = command("-m", *arguments, "pruner.ratio=0.3,0.5", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("store/stages/large-*"))) == 1
    assert len(list(tmp_path.glob("sweep/*/summary.json"))) == 2
    assert len(list(tmp_path.rglob("stages"))) == 1
