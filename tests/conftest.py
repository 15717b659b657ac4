"""Fixtures that run whole small studies, and one that opens pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import SMALL, configure
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts

# The networks are too small for two threads to help, and threads that wait for each other suffer from any other load.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
