"""How tests run studies: in their own process, or through the command line in another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rethink_prune.__main__ import conf_dir
from rethink_prune.config import StudyConfig
from rethink_prune.study import check_config

# Digits at their own size, a few hundred of them, a few epochs: a study of four stages in about two seconds.
SMALL = (
    "dataset.image_size=8",
    "dataset.train_limit=200",
    "dataset.test_limit=100",
    "recipe.epochs=2",
    "recipe.finetune.epochs=1",
    "precision=fp32",
    "device=cpu",
)


def configure(*overrides: str) -> StudyConfig:
    """Compose and validate as the command line does."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        tree = compose("config", overrides=list(overrides))
    return check_config(OmegaConf.to_container(tree, resolve=True))  # type: ignore[arg-type]


def command(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python -m rethink_prune`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "rethink_prune", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
