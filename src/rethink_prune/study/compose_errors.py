"""Say in one line why Hydra could not compose a configuration, with the names that are nearest to a slip."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import cast

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from rethink_prune.config import StudyConfig
from rethink_prune.errors import UserError, suggestion
from rethink_prune.files import conf_dir

# What Hydra says of a key, which it puts in quotes.
_KEY = re.compile(
    r"Could not (?:override|append to config|delete)\b.*?'(?P<key>[^']+)'"
    r"|Multiple values for (?P<twice>\S+)\.|^(?P<again>\S+) appears more than once in"
)


def composition_error(error: Exception, overrides: Sequence[str]) -> UserError:
    """Return what is wrong with `overrides`, from the error that Hydra raised about them.

    Parameters
    ----------
    error : Exception
        Of ``hydra.compose``, or of a command that Hydra runs.
    overrides : sequence of str
        As they were typed; other arguments may stand between them.

    Examples
    --------
    >>> from hydra import compose, initialize_config_dir
    >>> from hydra.errors import HydraException
    >>> with initialize_config_dir(conf_dir(), version_base="1.3"):
    ...     try:
    ...         compose("config", ["pruner.ratoi=0.3"])
    ...     except HydraException as error:
    ...         print(composition_error(error, ["pruner.ratoi=0.3"]))
    pruner.ratoi: unknown key; did you mean ratio?
    """
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return error
    if isinstance(error, MissingConfigException):
        return UserError(_missing_choice(error))
    if isinstance(error, OverrideParseException):
        form = "" if "=" in error.override else "; it must have the form key=value"
        return UserError(f"{error.override}: cannot be read: {str(error).splitlines()[-2 if form else 0]}{form}")
    if (ambiguous := re.search(r"Ambiguous value for argument '(.*?)' 1\.", said)) is not None:
        key, _, values = ambiguous[1].partition("=")
        return UserError(f"{ambiguous[1]}: several values: add -m to run each, or write a list: {key}=[{values}]")
    found = _KEY.search(said)
    if found is not None:
        key = found["key"] or found["twice"] or found["again"]
        typed = next((text for text in overrides if text.lstrip("+~").partition("=")[0] == key), key)
        return UserError(_wrong_key(typed, key, error.__cause__))
    cause = f": {str(error.__cause__).splitlines()[0]}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return UserError(said + cause)


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not error.options:
        return f"{error.missing_cfg_file}: there is no such configuration"
    # Named by a file, and not on the command line.
    file = re.match(r"In '(?!config')([^']+)'", str(error))
    return f"{f'in {file[1]}: ' if file else ''}{group}={choice}: no such choice; {suggestion(choice, error.options)}"


def _wrong_key(typed: str, key: str, cause: BaseException | None) -> str:
    """Say what is wrong with a key: it is unknown, or its sign is the wrong one."""
    *path, name = key.split(".")
    groups = [folder.name for folder in Path(conf_dir()).iterdir() if folder.is_dir()]
    if typed.startswith("+") or key in groups:
        return f"{typed}: leave out the sign before {key}: {typed.lstrip('+~')}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        # Where the path leaves the configuration: of recipe.fintune.epochs, that is recipe.fintune.
        *path, name = str(cause.full_key).split(".")
    node = getattr(cause, "parent_node", None)
    known = [str(name) for name in node if name != "_target_"] if isinstance(node, DictConfig) else []
    schema = list(_schema_keys(path))
    # The mappings of arguments for code of one's own are empty in the files, and take any key.
    is_free = isinstance(node, DictConfig) and not known and path[0] != "hydra"
    full = ".".join([*path, name])
    if others := _choices_with(path, name):
        return f"{full}: is a key of {path[0]}={', '.join(others)} alone"
    if (name in schema or is_free) and not typed.startswith("~"):
        return f"{typed}: is in no file yet, and needs a sign: +{typed}"
    known = [*dict.fromkeys([*known, *schema, *(groups if not path else [])])]
    return f"{full}: unknown key; {suggestion(name, known)}" if known else f"{full}: there is no such key"


def _choices_with(path: Sequence[str], name: str) -> list[str]:
    """Return the choices of a group that have a key."""
    files = sorted((Path(conf_dir()) / path[0]).glob("*.yaml")) if len(path) == 1 else []
    return [file.stem for file in files if _has_key(file, name)]


def _has_key(file: Path, name: str) -> bool:
    """Say whether the file of a choice, or one of its group that it starts from, has a key."""
    content = cast(DictConfig, OmegaConf.load(file))
    starts = [file.parent / f"{start}.yaml" for start in content.get("defaults", ()) if start != "_self_"]
    return name in content or any(_has_key(start, name) for start in starts if start.is_file())


def _schema_keys(path: Sequence[str]) -> Iterator[str]:
    """Yield the keys that a group of keys may have by the schema, whatever is in the files."""
    part: object = StudyConfig
    for name in path:
        field = part.model_fields.get(name) if isinstance(part, type) and issubclass(part, BaseModel) else None
        part = None if field is None else field.annotation
    if isinstance(part, type) and issubclass(part, BaseModel):
        yield from part.model_fields


def check_hydra_keys(node: DictConfig, path: str = "hydra") -> None:
    """Raise `UserError` for a key of Hydra's own configuration that it does not have: a ``+`` adds any.

    Examples
    --------
    >>> from hydra.conf import HydraConf
    >>> hydra = OmegaConf.structured(HydraConf)
    >>> OmegaConf.update(hydra, "job.chdri", True, force_add=True)
    >>> check_hydra_keys(hydra)
    Traceback (most recent call last):
    rethink_prune.errors.UserError: hydra.job.chdri: unknown key; did you mean chdir?
    """
    kind = OmegaConf.get_type(node)
    # A class without fields, as some launchers have, says nothing of its keys. Hydra's group hydra/env is in no class.
    known = [*(field.name for field in fields(kind)), "env"] if is_dataclass(kind) and fields(kind) else None
    for key, value in node.items_ex(resolve=False):
        name = str(key)
        if known is not None and name not in known:
            raise UserError(f"{path}.{name}: unknown key; {suggestion(name, known)}")
        if isinstance(value, DictConfig) and not OmegaConf.is_missing(node, name) and not value._is_none():
            check_hydra_keys(value, f"{path}.{name}")
