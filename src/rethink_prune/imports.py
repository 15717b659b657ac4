"""Import what a user names on the command line, as ``path.to.module:attribute``."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError


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
            raise UserError(f"{what}={path}: no module named {error.name}, neither installed nor in {here}") from error
        reason = f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"
        raise UserError(f"{what}={path}: importing {module_name} failed with {reason}") from error
    finally:
        sys.path.remove(here)
    try:
        found: object = getattr(module, attribute)
    except AttributeError:
        raise UserError(f"{what}={path}: {module_name} has no {attribute}") from None
    if not callable(found):
        raise UserError(f"{what}={path}: is a {type(found).__name__}, not something that can be called")
    return found
