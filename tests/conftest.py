"""Fixtures that run whole small studies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import SMALL, configure
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts

# The networks are too small for two threads to help, and threads that wait for each other suffer from any other load.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``cuda`` where there is no such device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def small_study(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a small study with the test's own store; further arguments override its configuration."""
    runs = 0

    def run(*overrides: str) -> dict[str, Any]:
        nonlocal runs
        runs += 1
        config = configure(*SMALL, f"store.root={tmp_path / 'store'}", *overrides)
        with Interrupts() as interrupts:
            return run_study(config, tmp_path / f"run{runs}", interrupts)

    return run
