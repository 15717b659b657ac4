"""What a summary says about a study as a whole: what was asked, on what, with which versions."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rethink_prune.config import StudyConfig
from rethink_prune.study.arms import ARMS
from rethink_prune.study.keys import settings
from rethink_prune.study.prepare import PreparedStudy
from rethink_prune.training.runtime import describe_device


def describe_study(study: PreparedStudy, experiment: str | None) -> dict[str, Any]:
    """Return the part ``study`` of a summary; `experiment` is the name of the experiment file, if there is one."""
    config, info = study.config, study.inputs.info
    return {
        "experiment": experiment,
        "dataset": config.dataset.name,
        "train_images": info.train_images,
        "test_images": info.test_images,
        "model": config.model.name,
        "pruner": config.pruner.name,
        "target": {config.pruner.target_option: getattr(config.pruner, config.pruner.target_option)},
        "recipe": config.recipe.name,
        "budget": config.budget.name,
        "seed": config.seed,
        "device": describe_device(study.runtime.device),
        "precision": study.runtime.precision,
        "arms": list(config.arms),
        "settings": settings(config, study.parts),
        "versions": _package_versions(),
        "commit": _commit(),
        "warnings": _warnings(study),
    }


def hparams(config: StudyConfig) -> dict[str, Any]:
    """Return the configuration as TensorBoard's table of all runs shows it."""
    return config.model_dump(mode="json", exclude={"arms", "store", "dry_run"}, serialize_as_any=True)


def _warnings(study: PreparedStudy) -> list[str]:
    draws_anew = any(ARMS[name].weights == "fresh" for name in study.config.arms)
    if study.networks.init is not None or not draws_anew:
        return []
    return [
        f"{study.config.model.name} belongs to no known family: scratch arms draw weights with "
        "reset_parameters; name an initialiser with model.init if that is not how it is trained"
    ]


def _package_versions() -> dict[str, str]:
    names = ("rethink-prune", "torch", "torchvision", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None for an installed copy."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
