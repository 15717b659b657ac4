"""Every README: its links lead somewhere, and its commands work as a reader would type them, only smaller.

A block of code without a language holds commands. Output of a command is in a block of the language ``text``. A block
of Python is a file if it starts with its name, ``# my_network.py``, and is run otherwise.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from harness import SMALL, run_forked

CHECKOUT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FOLDERS = ("conf", "experiments", "scripts", "src", "tests")
ROOT_PAGE = CHECKOUT / "README.md"
PAGES = [ROOT_PAGE, *sorted(page for folder in FOLDERS for page in (CHECKOUT / folder).rglob("README.md"))]
MOST_LINES = 200

# Commands that download something.
INSTALLATIONS = (["python3", "-m", "venv"], [".venv/bin/pip", "install"], ["pip", "install"])
# Options that decide how long a study takes, or which images it needs: such a command ends with its plan.
BIG = re.compile(r"(experiment|model|recipe|budget|dataset)=|(recipe|budget)\.|-m$")
# What a test machine lacks: a cluster, and weights that are downloaded.
MISSING = re.compile(r"launcher=(slurm|ray)$|hydra\.launcher\.|large\.checkpoint=torchvision:|\.\.\.$")
# Loaded once for all commands that are run in processes forked from one.
PRELOADED = ("rethink_prune.study.run", "torchvision", "torch.utils.tensorboard", "scipy.stats", "matplotlib.figure")


by_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(CHECKOUT).parent) for page in PAGES])


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and content of every block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    lines = "\n".join(content for language, content in blocks(page) if not language).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.split(r"\s#", line)[0].strip())]


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len(ROOT_PAGE.read_text().splitlines()) <= MOST_LINES


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@by_page
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths between backticks that start with one of our folders are there, seen from the checkout."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/(?:[a-z0-9_./]|README)*)`", prose(page))
    assert [path for path in named if not (CHECKOUT / path).exists()] == []


def write_photos(root: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def write_hub_sets(folder: Path) -> None:
    """Write small parquet files where a name on the hub is found first: in a folder of that name."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    buffers = [io.BytesIO() for _ in pixels]
    for image, buffer in zip(pixels, buffers, strict=True):
        Image.fromarray(image).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    for name, key, test in (("uoft-cs/cifar10", "img", "test"), ("ILSVRC/imagenet-1k", "image", "validation")):
        (folder / name).mkdir(parents=True)
        for split in ("train", test):
            pq.write_table(pa.table({key: images, "label": [0, 1, 0, 1]}), folder / name / f"{split}.parquet")


def write_modules(page: Path, folder: Path) -> None:
    """Write the Python files that a page shows."""
    for language, content in blocks(page):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", content)):
            (folder / name[1]).write_text(content)


def run(words: Sequence[str], folder: Path, *, environment: dict[str, str]) -> None:
    """Run a command in `folder`; ``python -m ...`` in a process that has the libraries loaded already."""
    # A table of stages needs no library, and joblib's processes would outlive one that is forked.
    forked = words[:2] == ["python", "-m"] and words[2].startswith("rethink_prune")
    if forked and words[2] != "rethink_prune.status" and "launcher=local" not in words:
        status, output = run_forked(words[2:], folder, environment, preload=PRELOADED, timeout=300)
    else:
        arguments = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(
            arguments, cwd=folder, env=environment, input="no\n", capture_output=True, text=True, timeout=300
        )
        status, output = done.returncode, done.stdout + done.stderr
    assert status == 0, f"{shlex.join(words)}\n{output}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path, tables = os.pathsep.join([".", *sys.path]), str(tmp_path_factory.mktemp("tables"))
    return {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": tables, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Return a folder with a run, its store, images, and the files that the first page shows."""
    folder = tmp_path_factory.mktemp("workplace")
    write_photos(folder / "photos")
    write_hub_sets(folder)
    write_modules(ROOT_PAGE, folder)
    run(["python", "-m", "rethink_prune", *SMALL], folder, environment=environment)
    return folder


@pytest.fixture
def folder(page: Path, workplace: Path, tmp_path: Path) -> Path:
    """Return the folder in which a page's commands run: with the files it shows, and a store shared by all pages."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("store"))
    (tmp_path / "store").symlink_to(workplace / "store")
    write_modules(page, tmp_path)
    return tmp_path


def with_real_folders(text: str, folder: Path) -> str:
    """Put a run that is there, and its stages, in the place of those that a page names."""
    summary = sorted((folder / "runs").glob("*/*/summary.json"))[0]
    text = text.replace("runs/<date>/<time>", str(summary.parent.relative_to(folder)))
    for stage in re.findall(r'"stage": "(.*)"', summary.read_text()):
        name = Path(stage).name
        text = re.sub(rf"(store/stages/{name.partition('-')[0]})-([0-9a-f]+|\.\.\.)", rf"store/stages/{name}", text)
    return text


def smaller(words: list[str], *, first_page: bool) -> list[str]:
    """Return a study's command with less to do: a plan, if it is for a large network, or of a page but the first."""
    words = [word for word in words if not MISSING.match(word) and (first_page or word != "launcher=local")]
    words = [re.sub(r"^seed=(\d+),(\d+),.*", r"seed=\1,\2", word) for word in words]
    if any(word.startswith("experiment=") for word in words) or (
        not first_page and any(map(BIG.match, words[words.index("rethink_prune") + 1 :]))
    ):
        return [*(word for word in words if word != "dry_run=true"), "dry_run=true"]
    # The stand-ins for these sets are small already.
    has_own_images = not {"dataset=folder", "dataset=huggingface"}.isdisjoint(words)
    return words + [option for option in SMALL if not (has_own_images and option.startswith("dataset."))]


def check_board(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start TensorBoard, or what ``make board`` starts, and fetch its page."""
    if words[0] == "make":
        said = subprocess.run(["make", "board", "-n"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
        (words,) = [shlex.split(line) for line in said.splitlines() if "rethink_prune.board" in line]
    program = [sys.executable] if Path(words[0]).name == "python" else [str(BIN / words[0])]
    board = subprocess.Popen(
        [*program, *words[1:], "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert board.stdout is not None
    try:
        for line in board.stdout:
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                with urllib.request.urlopen(address[0], timeout=30) as page:
                    assert page.status == 200
                return
        raise AssertionError("TensorBoard did not start")
    finally:
        board.terminate()
        board.wait(timeout=30)


def check_watch(words: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """See that a table which is drawn again and again is there, and end it."""
    watching = subprocess.Popen(
        [sys.executable, *words[1:]], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    time.sleep(4)
    watching.terminate()
    output, _ = watching.communicate(timeout=30)
    assert "finetune" in output


def check_script(words: Sequence[str], environment: dict[str, str]) -> None:
    """See that a script of ours has the options that a command gives it: most of them run for long, or download."""
    done = subprocess.run(
        [sys.executable, words[1], "--help"],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    usage = done.stdout.split("\n\n")[0]
    assert [word for word in words[2:] if word.startswith("--") and word not in usage] == []
    if len(words) > 2 and not words[2].startswith("--"):
        assert re.search(rf"[{{,]{re.escape(words[2])}[,}}]", usage)


def check_command(command: str, folder: Path, environment: dict[str, str], *, first_page: bool) -> None:
    """Run a command of a page, or see as much of it as this machine can."""
    words = shlex.split(with_real_folders(command, folder))
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment = {**environment, name: value}
    if words[0] == ".venv/bin/python":
        words[0] = "python"
    if any(words[: len(start)] == start for start in INSTALLATIONS):
        return
    if words[:2] == ["make", "board"] or words[0] == "tensorboard" or words[2:3] == ["rethink_prune.board"]:
        check_board(words, folder, environment)
    elif words[0] == "eval":  # shell completion; tests/commands/test_completion.py asks it
        path = {**environment, "PATH": f"{BIN}{os.pathsep}{environment['PATH']}"}
        script = f"{command}\ncomplete -p rethink-prune"
        subprocess.run(["bash", "-c", script], env=path, check=True, capture_output=True)
    elif words[0] == "make":
        subprocess.run([*words, "-n"], cwd=CHECKOUT, check=True, capture_output=True)
    elif words[0].endswith(".sh"):  # experiments run for hours
        assert os.access(CHECKOUT / words[0], os.X_OK), words[0]
        subprocess.run(["bash", "-n", words[0]], cwd=CHECKOUT, check=True)
    elif words[0] in ("sbatch", "ray", "sky"):  # need a cluster; tests/test_cluster_recipes.py runs what they start
        assert [word for word in words[1:] if "scripts/" in word and not (CHECKOUT / word).exists()] == []
    elif words[:3] == ["python", "-m", "pytest"]:
        assert [word for word in words[3:] if not word.startswith("-") and not (CHECKOUT / word).exists()] == []
    elif words[0] == "python" and words[1].startswith("scripts/"):
        check_script(words, environment)
    elif words[0] == "python" and words[1].startswith("tests/"):
        assert (CHECKOUT / words[1]).exists()
        if words[2:]:  # without a name, it writes a page, for an hour
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
            )
            assert words[2] in done.stdout
    elif words[0] == "torchrun" and first_page:
        run(
            ["python", "-m", "torch.distributed.run", *smaller(words[1:], first_page=True)],
            folder,
            environment=environment,
        )
    elif words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        study = smaller(["python", "-m", options.training_script, *options.training_script_args], first_page=False)
        run([*study, "dry_run=true"], folder, environment=environment)
    elif "--watch" in words:
        check_watch(words, folder, environment)
    elif words[:2] == ["python", "-m"] and words[2].startswith("rethink_prune"):
        if words[2] == "rethink_prune":
            words = smaller(words, first_page=first_page)
        if "--evaluate" in words:
            words.append("dataset.image_size=8")
        if "--cost" in words:
            words += ["--rounds", "1"]
        run(words, folder, environment=environment)
    else:
        raise AssertionError(f"{command}: no rule says how to try this command")


@pytest.mark.slow
@by_page
def test_every_command_works(page: Path, folder: Path, environment: dict[str, str]) -> None:
    first_page = page == ROOT_PAGE
    found = commands(page)
    for command in found:
        if first_page or command not in commands(ROOT_PAGE):  # tried there
            check_command(command, folder, environment, first_page=first_page)
    if first_page:
        assert len(found) > 12
        assert list((folder / "runs").glob("*/*/*/summary.json")), "no sweep was run"
    for language, content in blocks(page):
        if language == "python" and not re.match(r"# \w+\.py\n", content):
            small = with_real_folders(content, folder).replace("resnet56", "resnet20").replace("range(10)", "range(2)")
            run(["python", "-c", small], folder, environment=environment)
