"""The pruners there are: those of this folder, found by looking into its files, and a user's own by import path."""

import inspect
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rethink_prune.config import PrunerOptions
from rethink_prune.errors import UserError
from rethink_prune.imports import find_named
from rethink_prune.pruning.channel_pruner import ChannelPruner, Channelwise
from rethink_prune.pruning.pruner import Pruner

log = logging.getLogger(__name__)

# What options and target a pruner found by name has, only its class knows.
AnyPruner = type[Pruner[Any, Any]]


def _built_in() -> Iterator[AnyPruner]:
    """Yield the classes of this folder that state a name; pieces that pruners share state none."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        for member in vars(import_module(f"{__package__}.{module.name}")).values():
            # In the class itself: a pruner that another one derives from has a name of its own.
            if inspect.isclass(member) and issubclass(member, Pruner) and "name" in vars(member):
                yield member


PRUNERS: Mapping[str, AnyPruner] = {
    pruner.name: pruner for pruner in sorted(_built_in(), key=lambda pruner: (pruner.position, pruner.name))
}


def find_pruner(name: str) -> AnyPruner:
    """Return the class of the pruner of that name: an entry of :data:`PRUNERS`, or the import path ``module:Class``.

    Raises
    ------
    UserError
        If there is no such pruner.

    Examples
    --------
    >>> find_pruner("l1").__name__
    'L1'
    """
    if not isinstance(name, str):
        raise UserError(
            f"pruner: {name!r} is no name; give one of {', '.join(PRUNERS)}, or path.to.module:Class as text"
        )
    found: Any = find_named(name, PRUNERS, "pruner.name", what="pruner", form="Class")
    if inspect.isclass(found) and issubclass(found, Pruner):
        found = _with_channel_defaults(found)
    if not (inspect.isclass(found) and issubclass(found, Pruner)) or inspect.isabstract(found):
        raise UserError(
            f"pruner.name={name}: must be a subclass of rethink_prune.pruning.ChannelPruner that defines scores(), "
            "or of Pruner that defines target() and prune()"
        )
    options_type = getattr(found, "options_type", None)
    if not (inspect.isclass(options_type) and issubclass(options_type, PrunerOptions)):
        raise UserError(f"pruner.name={name}: options_type must be a subclass of rethink_prune.config.ChannelOptions")
    return found


# Cached: a study asks for its pruner several times, and shall be told once.
@cache
def _with_channel_defaults(found: AnyPruner) -> AnyPruner:
    """Return a user's class as it is, or, if it was written when `Pruner` scored channels, with that behaviour."""
    if found is Pruner or issubclass(found, Channelwise) or not inspect.isabstract(found):
        return found
    # The first documentation had users derive from `Pruner` and define scores() or prune(), and left target() to it.
    log.warning("%s: a pruner of channels is a subclass of rethink_prune.pruning.ChannelPruner by now", found.__name__)
    base = ChannelPruner if hasattr(found, "scores") else Channelwise
    # The module stays the user's: stage keys hold the digest of its file.
    content = {"__module__": found.__module__, "__doc__": found.__doc__}
    return cast(AnyPruner, type(found.__name__, (found, base), content))
