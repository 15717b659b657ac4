"""What the results of stages depend on, as pure functions: stage keys, and what the report compares runs by.

A key holds exactly what decides a stage's result. Paths, workers, devices, log settings and the list of arms are in no
key. An option that came later enters a key only where it is used and differs from its default, so that the stages of
earlier versions stay valid.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.training.schedule import OptimizerSpec

# Options that came after the first stages were stored.
_LATER_OPTIONS = {"warmup", "decay_norms", "label_smoothing"}


def stage_name(kind: str, key: Mapping[str, Any]) -> str:
    """Return the name of a stage's folder: its kind, and 16 hexadecimal digits of a hash of its key.

    Examples
    --------
    >>> stage_name("large", {"seed": 0, "model": "vgg16"}) == stage_name("large", {"model": "vgg16", "seed": 0})
    True
    """
    text = json.dumps({"kind": kind, **key}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def optimizer_key(spec: OptimizerSpec) -> dict[str, Any]:
    """Return the options of an optimiser and its schedule that decide a training."""
    return {
        option.name: getattr(spec, option.name)
        for option in fields(spec)
        if not (option.name in _LATER_OPTIONS and getattr(spec, option.name) == option.default)
    }


def source_digest(obj: object) -> str:
    """Return the SHA-256 of the file that defines `obj`, in hexadecimal: a user's code in a key.

    Files that this one imports are not covered.

    Parameters
    ----------
    obj : object
        A function, a class, or an instance of a class.

    Raises
    ------
    UserError
        `obj` was not defined in a file.
    """
    name = getattr(obj, "__module__", None) or type(obj).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        raise UserError(f"{name}: was not loaded from a file, so its results cannot be told apart from others'")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
