"""Import what a user names on the command line, as ``path.to.module:attribute``, and tell when its code changes."""

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rethink_prune.errors import UserError, nearest, suggestion

T = TypeVar("T")

# Packages of networks that an extra of the same name installs.
_EXTRAS = ("timm",)


def import_object(path: str, what: str) -> Callable[..., Any]:
    """Import ``module:attribute``; modules in the current folder are found, as with ``python -m``.

    Only call this with text the user typed: importing a module runs it.

    Parameters
    ----------
    path : str
        Such as ``my_nets.small:build``.
    what : str
        The option `path` was given to, for error messages, e.g. ``"model.name"``.

    Returns
    -------
    callable
        The attribute.

    Raises
    ------
    UserError
        The path is malformed, the module is missing or fails to import, or the attribute is missing or not
        callable.

    Examples
    --------
    >>> import_object("math:sqrt", "model.name")
    <built-in function sqrt>
    >>> import_object("math.sqrt", "model.name")
    Traceback (most recent call last):
    rethink_prune.errors.UserError: model.name=math.sqrt: must have the form path.to.module:factory
    """
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute.isidentifier()):
        raise UserError(f"{what}={path}: must have the form path.to.module:factory")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a console script, unlike `python -m`, does not look there
    try:
        # The user may have written the module after Python listed the folder.
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except Exception as error:
        # A package that is missing inside the user's module is a failure of that module, not a wrong path.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            if error.name in _EXTRAS:
                install = f'pip install "rethink-prune[{error.name}]"'
                raise UserError(f"{what}={path}: needs {error.name}; install it with {install}") from error
            raise UserError(f"{what}={path}: no module named {error.name}, neither installed nor in {here}") from error
        reason = f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"
        raise UserError(f"{what}={path}: importing {module_name} failed with {reason}") from error
    finally:
        sys.path.remove(here)
    try:
        found: object = getattr(module, attribute)
    except AttributeError:
        meant = nearest(attribute, (name for name in vars(module) if not name.startswith("_")))
        raise UserError(f"{what}={path}: {module_name} has no {attribute}{meant and f'; {meant}'}") from None
    if not callable(found):
        raise UserError(f"{what}={path}: is a {type(found).__name__}, not something that can be called")
    return found


def find_named(name: str, known: Mapping[str, T], option: str, *, what: str, form: str) -> T | Callable[..., Any]:
    """Return an entry of a table, or import what an import path names.

    Parameters
    ----------
    name : str
    known : mapping of str to object
        The table.
    option : str
        What `name` was given to, e.g. ``"model.name"``.
    what, form : str
        What the table holds, and what stands behind the colon of a path, for messages.

    Raises
    ------
    UserError
        If it is neither in the table nor a path, or as `import_object` does.

    Examples
    --------
    >>> find_named("two", {"one": 1}, "count", what="number", form="function")
    Traceback (most recent call last):
    rethink_prune.errors.UserError: count=two: no such number (your own: path.to.module:function); known are one
    """
    if name in known:
        return known[name]
    if ":" in name:
        return import_object(name, option)
    raise UserError(f"{option}={name}: no such {what} (your own: path.to.module:{form}); {suggestion(name, known)}")


def source_digest(obj: object, path: str = "") -> str:
    """Return the SHA-256 of a user's own code that an object comes from, in hexadecimal: its part in a key.

    The code is the module that the user named, those that define the object, and all modules that these import,
    directly or not, at their top or in functions, as long as they belong neither to Python nor to an installed package.
    What a program imports by a name that it computes, and files that it reads, are not seen.

    Parameters
    ----------
    obj : object
        A function, a class, an instance of a class, or one of these behind ``functools.partial`` or decorators.
    path : str
        The import path that the user gave, ``module:attribute``.

    Raises
    ------
    UserError
        `obj` was not defined in a file.

    Examples
    --------
    >>> source_digest(json.dumps) == hashlib.sha256(Path(json.__file__).read_bytes()).hexdigest()
    True
    """
    defining = _defining_modules(obj)
    files = {name: file for name in defining if (file := _module_file(name)) is not None}
    if not files:
        raise UserError(f"{defining[0]}: was not loaded from a file, so its results cannot be told apart from others'")
    named = path.partition(":")[0]
    if (file := _module_file(named)) is not None and _is_first_party(file):
        files[named] = file
    waiting = [(name, file) for name, file in files.items() if _is_first_party(file)]
    while waiting:
        for name, file in _imported_files(*waiting.pop()):
            if name not in files and _is_first_party(file):
                files[name] = file
                waiting.append((name, file))
    contents = {file.resolve(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()}
    if len(contents) == 1:
        return next(iter(contents.values()))
    listed = sorted((name, contents[file.resolve()]) for name, file in files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _defining_modules(obj: object) -> list[str]:
    """Return the modules that define an object and what it wraps."""
    found = []
    waiting, seen = [obj], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        name = getattr(part, "__module__", None) or type(part).__module__
        if isinstance(part, functools.partial):
            waiting += [part.func, *filter(callable, (*part.args, *part.keywords.values()))]
            continue
        found.append(name)
        waiting += [part.__wrapped__] if hasattr(part, "__wrapped__") else []
        if isinstance(part, types.MethodType):
            waiting.append(part.__self__)
    return found


def _imported_files(name: str, file: Path) -> Iterator[tuple[str, Path]]:
    """Yield the modules that a module's file imports, and the packages that it lies in."""
    if file.suffix != ".py":
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    wanted = [package]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            wanted += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    for module in wanted:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            if (found := _module_file(part)) is not None:
                yield part, found


def _module_file(name: str) -> Path | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None and name:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):  # its package is none, or cannot be imported
            return None
        file = spec.origin if spec and spec.has_location else None
    return Path(file) if file else None


def _is_first_party(file: Path) -> bool:
    """Tell whether a file belongs neither to Python, nor to an installed package, nor to this one."""
    paths = sysconfig.get_paths()
    foreign = [Path(paths[kind]).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    foreign.append(Path(__file__).resolve().parent)
    resolved = file.resolve()
    installed = {"site-packages", "dist-packages"}.intersection(resolved.parts)
    return resolved.is_file() and not installed and not any(resolved.is_relative_to(folder) for folder in foreign)
