"""Memory: the peak is that of the process, every stage tells its own, and training does not add to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rethink_prune.training.runtime import peak_memory

CPU = torch.device("cpu")

# Prints the resident memory after every epoch.
EPOCHS = """
    import sys, tempfile
    from pathlib import Path
    import torch
    from rethink_prune.data import EvalBatches, ImageArray, TrainBatches
    from rethink_prune.data.device_images import DeviceImages
    from rethink_prune.data.normalization import Normalization
    from rethink_prune.models import build_model
    from rethink_prune.training.hooks import TrainingHooks
    from rethink_prune.training.checkpoint import Checkpoints
    from rethink_prune.training.interrupts import Interrupts
    from rethink_prune.training.runtime import Runtime
    from rethink_prune.training.schedule import OptimizerSpec
    from rethink_prune.training.train import train

    cpu = torch.device("cpu")
    pixels = torch.randint(0, 256, (70, 8, 8, 3), dtype=torch.uint8)
    images = ImageArray(pixels, torch.arange(70) % 10)
    normalize = Normalization((0.5,) * 3, (0.25,) * 3, image_size=pixels.shape[1], device=cpu)

    def tell(rows):
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(line.split()[1] for line in status if line.startswith("VmRSS")))

    with tempfile.TemporaryDirectory() as folder:
        train(
            build_model("resnet20"),
            TrainBatches(DeviceImages(images, normalize, pad=1, flip=True, seed=0), batch_size=32),
            {"test": EvalBatches(DeviceImages(images, normalize), batch_size=64)},
            OptimizerSpec("sgd", 0.01, 0.9, False, 1e-4, "cosine", 30, (), ()),
            runtime=Runtime(cpu, "fp32", checkpoint_seconds=0),
            hooks=TrainingHooks(),
            seed=0,
            checkpoints=Checkpoints(Path(folder)),
            interrupts=Interrupts(),
            on_epoch=tell,
        )
"""


@pytest.mark.slow
def test_resident_memory_is_flat_over_thirty_epochs() -> None:
    code = "\n".join(line[4:] for line in EPOCHS.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident = [int(line) / 1024 for line in done.stdout.split()]
    assert len(resident) == 30
    # One copy of ResNet-20 with its momentum is 2 MiB; the first epochs fill the allocator's and oneDNN's caches.
    assert max(resident[10:]) - resident[9] < 4


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    before = peak_memory(CPU)
    assert before is not None
    torch.ones(before, dtype=torch.uint8)  # freed at once
    after = peak_memory(CPU)
    assert after is not None
    assert after > before


def test_every_stage_tells_its_peak(small_study: Callable[..., dict[str, Any]]) -> None:
    summary = small_study("arms=[finetune]", "recipe.epochs=1")
    peaks = [summary["large"], summary["pruned"], summary["arms"]["finetune"]]
    values = [entry["peak_memory_bytes"] for entry in peaks]
    assert values == sorted(values), "a process has one peak, which only rises"
    assert values[0] > 50_000_000
