"""The shape of the code: which way imports point, how long a function may be, and that a name means one thing."""

from __future__ import annotations

import ast
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import rethink_prune

PACKAGE = Path(rethink_prune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
LONGEST_FUNCTION = 80
MOST_LINES = 20_000

# A folder, or a module at the root, imports only from rows below its own, and from its own folder.
LAYERS = (
    {"__main__", "board", "doctor", "export", "patterns", "sensitivity", "status"},
    {"commands", "report"},
    {"finished"},
    {"study"},
    {"pruning"},
    {"detection"},
    {"training"},
    {"data", "models", "tracking", "state"},
    {"surgery", "store"},
    {"cost", "config"},
    {"imports", "files", "text", "copying", "outputs", "turns"},
    {"seeds", "errors"},
)


def module_name(path: Path) -> str:
    parts = ("rethink_prune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every module of the package that is imported, for type checking and inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


IMPORTS = {name: set(imported(TREES[path])) - {name} for name, path in MODULES.items()}


def test_no_import_circle() -> None:
    state: dict[str, str] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in state:
            state[name] = "open"
            for other in sorted(IMPORTS[name]):
                visit(other, (*way, name))
            state[name] = "closed"

    for name in sorted(IMPORTS):
        visit(name, ())


def folder(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_imports_point_one_way() -> None:
    row = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    assert {folder(name) for name in MODULES} == {*row, "__init__"}
    for name, others in IMPORTS.items():
        if name == "rethink_prune":
            continue
        for other in others - {"rethink_prune"}:
            own, its = folder(name), folder(other)
            assert own == its or row[own] < row[its], f"{name} imports {other}"


def test_models_need_nothing_of_ours_but_errors_and_imports() -> None:
    for name, others in IMPORTS.items():
        if folder(name) == "models":
            assert {folder(other) for other in others} <= {"models", "errors", "imports"}, name


def lines_of_code(path: Path) -> set[int]:
    """Return the lines that hold code: no docstrings, comments or blank lines."""
    documentation: set[int] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            documentation.update(range(text.lineno, (text.end_lineno or 0) + 1))
    lines: set[int] = set()
    aside = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in {*aside, tokenize.ENDMARKER}:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines - documentation


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_functions_are_short(path: Path) -> None:
    code = lines_of_code(path)
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            length = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            assert length <= LONGEST_FUNCTION, f"{module_name(path)}.{node.name}: {length} lines of code"


def test_the_package_stays_small() -> None:
    assert sum(len(lines_of_code(path)) for path in FILES) <= MOST_LINES


def test_a_name_means_one_thing() -> None:
    """Functions and classes of modules have names of their own; every command has its `main`."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in MODULES.items():
        for node in TREES[path].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in {"main", "__getattr__"}:
                found[node.name.lstrip("_")].append(f"{name}.{node.name}")
    assert [names for names in found.values() if len(names) > 1] == []
