import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from rethink_prune.errors import UserError
from rethink_prune.imports import import_object, source_digest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_modules_of_the_current_folder_are_found(here: Path) -> None:
    (here / "found_here.py").write_text("def build():\n    return 42\n")
    before = list(sys.path)
    build = import_object("found_here:build", "model.name")
    assert build() == 42  # type: ignore[operator]
    assert sys.path == before


def test_installed_modules_are_found() -> None:
    assert import_object("pathlib:Path", "model.name") is Path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("resnet", "must have the form path.to.module:factory"),
        (":build", "must have the form path.to.module:factory"),
        ("module:", "must have the form path.to.module:factory"),
        ("module:a b", "must have the form path.to.module:factory"),
        ("pathlib:Pfad", "pathlib has no Pfad"),
        ("pathlib:PurePth", "pathlib has no PurePth; did you mean PurePath, PurePosixPath or PureWindowsPath?"),
        ("sys:path", "is a list, not something that can be called"),
    ],
)
def test_wrong_paths_are_refused(path: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        import_object(path, "model.name")
    assert str(error.value) == f"model.name={path}: {message}"


def test_missing_module_is_told_from_a_missing_import_of_it(here: Path) -> None:
    (here / "needs_more.py").write_text("import surely_not_there\n")
    with pytest.raises(UserError, match=f"no module named not_here, neither installed nor in {here}"):
        import_object("not_here:build", "model.name")
    with pytest.raises(UserError, match=r"importing needs_more failed with ModuleNotFoundError: .*surely_not_there"):
        import_object("needs_more:build", "model.name")


def test_module_that_fails_is_named_with_the_reason(here: Path) -> None:
    (here / "broken_module.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="importing broken_module failed with ZeroDivisionError: division by zero"):
        import_object("broken_module:build", "dataset.name")


def test_digest_is_that_of_the_file(here: Path) -> None:
    source = here / "digested.py"
    source.write_text("class Net:\n    def __call__(self): ...\n\ndef build(): ...\n")
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    build, net = (import_object(f"digested:{name}", "model.name") for name in ("build", "Net"))
    assert source_digest(build) == source_digest(net) == source_digest(net()) == expected  # type: ignore[operator]


def test_digest_needs_a_file() -> None:
    with pytest.raises(UserError, match="builtins: was not loaded from a file"):
        source_digest(len)


FACTORIES = {
    "plain": "from deep.nets import Net\nbuild = Net\n",
    "partial": "from functools import partial\nfrom deep.nets import Net\nbuild = partial(Net, 3)\n",
    "decorated": "from deep.nets import wrapped\nbuild = wrapped\n",
    "method": "from deep.nets import Net\nbuild = Net.make\n",
    "instance": "from deep.nets import Maker\nbuild = Maker()\n",
    "lambda": "import deep.nets as n\nbuild = lambda num_classes: n.Net(num_classes)\n",
    "inside": "def build(num_classes):\n    from deep import nets\n    return nets.Net(num_classes)\n",
}
NETS = """
import functools
from .parts import WIDTH

def decorate(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

class Net:
    def __init__(self, num_classes): self.width = WIDTH
    @classmethod
    def make(cls, num_classes): return cls(num_classes)

class Maker:
    def __call__(self, num_classes): return Net(num_classes)

@decorate
def wrapped(num_classes): return Net(num_classes)
"""


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("partial", "inside") else pytest.param(kind, marks=pytest.mark.slow) for kind in FACTORIES],
)
def test_digest_covers_all_of_the_users_own_code(kind: str, here: Path) -> None:
    """Its value in a new process changes with every file that the factory comes from, and with no other."""
    (here / "deep").mkdir()
    files = {"deep/__init__.py": "", "deep/nets.py": NETS, "deep/parts.py": "WIDTH = 8\n", "top.py": FACTORIES[kind]}
    for name, text in files.items():
        (here / name).write_text(text)
    (here / "apart.py").write_text("")

    def digest() -> str:
        script = (
            "from rethink_prune.imports import import_object, source_digest\n"
            "print(source_digest(import_object('top:build', 'model.name'), 'top:build'))"
        )
        command = [sys.executable, "-B", "-c", script]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout

    before = digest()
    (here / "apart.py").write_text("x = 1\n")
    assert digest() == before
    for name, text in files.items():
        (here / name).write_text(text + "# changed\n")
        assert digest() != before, name
        (here / name).write_text(text)
    assert digest() == before
