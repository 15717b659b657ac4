"""The command line answers soon: what is slow to import waits until something needs it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

# Prints the modules that are loaded when the first training step is done.
FIRST_STEP = """
import os, sys
import torch
torch.set_num_threads(1)
from rethink_prune.__main__ import main
from rethink_prune.training.step import PlainStep
real = PlainStep.__call__
def first(*arguments):
    real(*arguments)
    print("modules", *sys.modules, flush=True)
    os._exit(0)
PlainStep.__call__ = first
main()
"""


def test_help_needs_no_library_but_hydra(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rethink_prune", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - start
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in imported
    assert not imported & {"torch", "numpy", "scipy", "sklearn", "torchvision", "matplotlib", "pydantic"}
    assert seconds < 15, "three are asked for of an idle machine: scripts/benchmark.py startup"


def test_the_first_step_comes_soon_and_without_libraries_it_has_no_use_for(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, "device=cpu"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - start
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("modules")]
    modules = set(line.split())
    assert "torch" in modules
    # What others use; not pandas, which torch and scikit-learn import where it is installed.
    slow = {"torchvision", "sklearn.linear_model", "matplotlib", "tensorflow", "datasets", "wandb", "trackio", "mlflow"}
    assert not modules & slow
    assert seconds < 60, "ten are asked for of an idle machine: scripts/benchmark.py startup"
