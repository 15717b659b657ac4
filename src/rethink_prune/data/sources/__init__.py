"""The data sets by name. To add one, write one module here and ``conf/dataset/<name>.yaml``; nothing else changes.

The module is found by itself. It defines

- ``SOURCES``: for each ``dataset.name`` that it serves, a function that takes the
  :class:`~rethink_prune.config.DatasetConfig` and returns a :class:`~rethink_prune.data.source.DataSource`. The
  function decodes nothing, downloads no more than it needs to count the images, and raises `UserError` for options
  that do not fit the data set;
- ``RANK``: errors list the names in this order, from small to large data sets.

Every configuration imports the module: packages that take long to import belong inside the function that needs them.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import DataSource
from rethink_prune.data.sources.own import own_source
from rethink_prune.errors import UserError, suggestion


def built_in_sources() -> dict[str, Callable[[DatasetConfig], DataSource]]:
    """Return the function of every data set by name.

    Examples
    --------
    >>> list(built_in_sources())[0]
    'digits'
    """
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    # `own` declares none: its data sets have the user's names.
    ranked = sorted((module for module in modules if hasattr(module, "SOURCES")), key=lambda module: module.RANK)
    return {name: source for module in ranked for name, source in module.SOURCES.items()}


def find_source(options: DatasetConfig) -> DataSource:
    """Return what is known about the data set ``options.name``, without decoding an image.

    Raises
    ------
    UserError
        There is no such data set, an option does not fit it, or its files are not where and as they should be.

    Examples
    --------
    >>> sum(find_source(DatasetConfig(name="cifar10")).train_counts)
    50000
    """
    if ":" in options.name:
        return own_source(options)
    if options.args:
        raise UserError(f"dataset.args={options.args}: only dataset.name=path.to.module:factory takes arguments")
    sources = built_in_sources()
    if options.name not in sources:
        own = "your own: path.to.module:factory"
        raise UserError(f"dataset.name={options.name}: no such data set ({own}); {suggestion(options.name, sources)}")
    return sources[options.name](options)
