"""What is installed: sdist, the wheel built from it, its commands, its types, and where its version comes from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_version_is_that_of_a_tag_and_a_stated_one_without(tmp_path: Path) -> None:
    def version() -> str:
        asked = [sys.executable, "-m", "hatchling", "version"]
        return subprocess.run(asked, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert version() == "0.2.0.dev0"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert version().startswith("0.2.0.dev1+g")
    git("tag", "v7.1.0", "-m", "a release")
    assert version() == "7.1.0"


def test_every_extra_that_is_told_to_be_installed_exists_as_it_is_spelled() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    # pip of Python 3.11 finds an extra by its normalised name alone.
    assert [name for name in extras if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []
    folders = ("src", "conf", "experiments", "scripts")
    files = [ROOT / "README.md", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    texts = [file.read_text() for file in files if file.suffix in (".py", ".md", ".yaml", ".sh", ".ipynb")]
    told = {
        name for text in texts for found in re.findall(r"rethink-prune\[([\w,-]+)\]", text) for name in found.split(",")
    }
    assert told
    assert told <= extras.keys()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an sdist of the checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel, in which a path file shows the dependencies of the test's environment."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(packages[1])], check=True, capture_output=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return place


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a command of the environment in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(installed / "bin" / command), *arguments]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_sdist_and_wheel_have_what_is_needed_and_one_version(packages: tuple[Path, Path], run: Run) -> None:
    sdist, wheel = packages
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CITATION.cff", "CHANGELOG.md", "LICENSE", "conf/config.yaml", "src/rethink_prune/py.typed"} <= names
    version = "from importlib.metadata import version; print(version('rethink-prune'))"
    assert run("python", "-c", version).stdout.strip() == wheel.name.split("-")[1]
    assert sdist.name == f"rethink_prune-{wheel.name.split('-')[1]}.tar.gz"


@pytest.mark.slow
def test_the_wheel_finds_its_configuration_from_an_empty_folder(installed: Path, run: Run) -> None:
    home = run("python", "-c", "import rethink_prune; print(rethink_prune.__file__)").stdout.strip()
    assert Path(home).is_relative_to(installed)
    done = run("rethink-prune", "experiment=l1_vgg16_cifar10", "dry_run=true")
    assert "| scratch_b" in done.stdout, done.stderr
    assert "243" in done.stdout


@pytest.mark.slow
def test_the_doctor_says_what_is_here_and_how_long_the_default_study_takes(run: Run, tmp_path: Path) -> None:
    done = run("rethink-prune-doctor")
    assert done.returncode == 0, done.stderr
    for line in (
        r"versions +Python 3\.\d+\.\d+, rethink-prune \S+, torch \d",
        r"extras +\w",
        r"device .*; precision=auto takes (bf16|fp32)",
        r"cores +\d+, load \d+\.\d; PyTorch takes \d+ threads",
        r"memory +\d+(\.\d+)? GB",
        r"disk +\d+(\.\d+)? [MGT]B free",
        rf"store +{tmp_path}/store: works",
        r"default study +about (\d+ h )?(\d+ min )?(\d+ s)?: an estimate from 3 epochs",
        r"The default study can run here: python -m rethink_prune",
    ):
        assert re.search(f"^{line}", done.stdout, flags=re.MULTILINE), (line, done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rethink_prune import Study, run_study\n\nsummary: int = run_study(Study({'seed': 1}), 'run')\n"
    )
    python = str(installed / "bin/python")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", "cache", "mine.py"]
    done = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'mine.py:3: error: Incompatible types in assignment (expression has type "dict[str, Any]"' in done.stdout
    assert "Found 1 error in 1 file" in done.stdout
