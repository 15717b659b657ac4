"""The README's how-to, command by command, as a reader would follow it: only smaller."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from harness import SMALL

CHECKOUT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def how_to() -> str:
    text = (CHECKOUT / "README.md").read_text()
    return text.split("\n## How to\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of every block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    lines = "\n".join(content for language, content in blocks(text) if not language).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def smaller(command: str, folder: Path) -> list[str]:
    """Return the arguments of a command, with less to do: what needs a download or a cluster ends with its plan."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = ["python", "-m", "torch.distributed.run"]
    if words[:2] == ["python", "-m"]:
        words[0] = sys.executable
    if "rethink_prune" in words:
        words = [word for word in words if word != "launcher=slurm" and not word.startswith("hydra.launcher.")]
        small = [option for option in SMALL if "dataset=folder" not in words or not option.startswith("dataset.")]
        words += ["dry_run=true"] if any(word.startswith("experiment=") for word in words) else small
    if "--evaluate" in words:
        words.append("dataset.image_size=8")
    stages = (folder / "store/stages").glob("*") if (folder / "store").is_dir() else []
    finetuned = next((str(stage.relative_to(folder)) for stage in stages if stage.name.startswith("finetune-")), "")
    return [re.sub(r"store/stages/finetune-[0-9a-f]+", finetuned, word) for word in words]


def write_photos(root: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def check_board(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start what ``make board`` starts, and fetch its page."""
    said = subprocess.run([*command, "-n"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    (started,) = [shlex.split(line) for line in said.splitlines() if "tensorboard --logdir" in line]
    board = subprocess.Popen(
        [str(BIN / "tensorboard"), *started[1:], "--port", "0"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert board.stderr is not None
    try:
        for line in board.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                with urllib.request.urlopen(address[0], timeout=30) as page:
                    assert page.status == 200
                return
        raise AssertionError("TensorBoard did not start")
    finally:
        board.terminate()
        board.wait(timeout=30)


def check_watch(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """See that a table which is drawn again and again is there, and end it."""
    watching = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    time.sleep(4)
    watching.terminate()
    output, _ = watching.communicate(timeout=30)
    assert "finetune" in output


def test_every_command_of_the_how_to_works(tmp_path: Path) -> None:
    text = how_to()
    for language, content in blocks(text):
        if language == "python":
            name = re.match(r"# (\w+\.py)", content)
            assert name is not None
            (tmp_path / name[1]).write_text(content)
    write_photos(tmp_path / "photos")
    (tmp_path / "runs").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), "OMP_NUM_THREADS": "1"}
    found = commands(text)
    assert len(found) > 12
    for command in found:
        arguments = smaller(command, tmp_path)
        if arguments[:2] == ["make", "board"]:
            check_board(arguments, tmp_path, environment)
        elif "--watch" in arguments:
            check_watch(arguments, tmp_path, environment)
        else:
            done = subprocess.run(
                arguments, cwd=tmp_path, env=environment, input="no\n", capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list((tmp_path / "runs").glob("*/*/summary.json"))
