"""Compare pruning and fine-tuning a trained network with training the pruned architecture from scratch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from rethink_prune.cost import Cost, count_cost
    from rethink_prune.finished.load import load_model
    from rethink_prune.models import build_model
    from rethink_prune.pruning import PruneResult, prune
    from rethink_prune.study.compose import Study
    from rethink_prune.study.run import run_study

__all__ = [
    "Cost",
    "PruneResult",
    "Study",
    "__version__",
    "build_model",
    "count_cost",
    "load_model",
    "prune",
    "run_study",
]

# Imported on first use, so that the command line answers before torch is loaded.
_MODULES = {
    "Cost": "rethink_prune.cost",
    "PruneResult": "rethink_prune.pruning",
    "Study": "rethink_prune.study.compose",
    "build_model": "rethink_prune.models",
    "count_cost": "rethink_prune.cost",
    "load_model": "rethink_prune.finished.load",
    "prune": "rethink_prune.pruning",
    "run_study": "rethink_prune.study.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rethink-prune")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
