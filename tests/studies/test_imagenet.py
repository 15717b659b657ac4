"""Whole small studies on a stand-in for ImageNet: streamed images, faults, resuming."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet34

from harness import configure, plan_of
from rethink_prune.data import TrainBatches
from rethink_prune.errors import UserError

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write six classes that differ in colour: 48 images to train on, 18 to test on."""
    random = np.random.default_rng(0)
    for side, count in (("train", 8), ("val", 3)):
        for label in range(6):
            folder = tmp_path / "imagenet" / side / f"n{label:08d}"
            folder.mkdir(parents=True)
            colour = np.array([255 * (label % 2), 255 * (label // 2 % 2), 255 * (label // 4)])
            for i in range(count):
                pixels = (colour + random.integers(0, 100, (4, 5, 3))) * (255 / 355)
                image = Image.fromarray(pixels.astype(np.uint8)).resize((50, 40))
                image.save(folder / f"{side}_{label}_{i}.JPEG")
    return tmp_path / "imagenet"


def overrides(root: Path, *more: str) -> list[str]:
    return [
        "dataset=imagenet",
        f"dataset.root={root}",
        "dataset.train_limit=null",
        "dataset.test_limit=null",
        "dataset.image_size=32",
        "recipe.batch_size=16",
        *more,
    ]


@pytest.mark.parametrize("more", [(), ("recipe.mixup=0.8", "recipe.cutmix=1", "recipe.rand_augment=9")])
def test_a_study_on_streamed_images(small_study: Run, root: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    arms = "arms=[finetune,scratch_e,scratch_kd@1]"
    arguments = overrides(root, "dataset.validation=0.25", "dataset.workers=1", arms, *more)
    summary = small_study(*arguments)
    assert (summary["study"]["train_images"], summary["study"]["test_images"]) == (36, 18)
    assert summary["pruned"]["top5"] >= summary["pruned"]["top1"]
    for entry in (summary["large"], *summary["arms"].values()):
        assert 100 >= entry["top5"] >= entry["top1"]
        with (Path(entry["stage"]) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert float(rows[-1]["test_top5"]) == entry["top5"]
        assert float(rows[-1]["validation_top5"]) >= float(rows[-1]["validation_top1"])
        assert float(rows[-1]["images"]) == 36
    assert "| top-5 % |" in (tmp_path / "run1/summary.md").read_text()
    # How images are read decides nothing.
    elsewhere = f"store.root={tmp_path / 'elsewhere'}"
    again = small_study(*arguments, "dataset.workers=0", elsewhere)
    assert {title: arm["loss"] for title, arm in again["arms"].items()} == {
        title: arm["loss"] for title, arm in summary["arms"].items()
    }
    assert small_study(*arguments, "dataset.workers=0")["arms"] == summary["arms"], "found in the store"


def test_a_pruner_that_looks_at_images_gets_them_streamed(small_study: Run, root: Path) -> None:
    summary = small_study(*overrides(root, "pruner=thinet", "arms=[finetune]", "dataset.workers=1", "recipe.epochs=1"))
    assert summary["arms"]["finetune"]["status"] == "done"


def test_a_damaged_image_ends_the_study_and_once_repaired_it_goes_on(
    small_study: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = overrides(root, "dataset.workers=1", "arms=[finetune]", "store.checkpoint_seconds=0")
    expected = small_study(*arguments, f"store.root={tmp_path / 'other'}")
    path = root / "train/n00000002/train_2_3.JPEG"
    whole = path.read_bytes()
    epochs = TrainBatches.epoch

    def damaging(self: TrainBatches, epoch: int, start_step: int = 0) -> Iterator[Any]:
        if epoch == 1:  # the first epoch went well
            path.write_bytes(whole[: len(whole) // 2])
        return epochs(self, epoch, start_step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "epoch", damaging)
        with pytest.raises(UserError, match=r"train/n00000002/train_2_3\.JPEG cannot be read"):
            small_study(*arguments)
    (checkpoint, *_) = sorted((tmp_path / "store").rglob("checkpoint-*"), reverse=True)
    assert checkpoint.name.startswith("checkpoint-000001"), "the first epoch is kept"
    path.write_bytes(whole)
    summary = small_study(*arguments)
    for name in ("top1", "top5", "loss"):
        assert summary["arms"]["finetune"][name] == expected["arms"]["finetune"][name]


KILLER = """
    import os, signal, sys
    from rethink_prune.training.step import PlainStep
    from rethink_prune.__main__ import main
    victim, count = sys.argv.pop(1), int(sys.argv.pop(1))
    update, calls = PlainStep.__call__, 0

    def dying(*args):
        global calls
        calls += 1
        if calls == count:
            if victim == "worker":
                import multiprocessing
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            elif victim == "study":
                os.kill(os.getpid(), signal.SIGKILL)
            else:  # everybody, as batch systems do
                os.killpg(0, signal.SIGTERM)
        return update(*args)

    PlainStep.__call__ = dying
    sys.argv[0] = "rethink_prune"
    main()
"""


def start(cwd: Path, root: Path, victim: str, count: int) -> subprocess.Popen[str]:
    arguments = overrides(root, "recipe.epochs=3", "recipe.finetune.epochs=1", "arms=[finetune]", "dataset.workers=2")
    arguments += ["store.checkpoint_seconds=0", "precision=fp32", "device=cpu"]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLER), victim, str(count), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def weights(cwd: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (cwd / "store").rglob("model.safetensors")}


def children_are_gone(session: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
# 3 steps an epoch, 9 of large and 3 of finetune.
@pytest.mark.parametrize(
    ("victim", "count", "status", "words"),
    [
        ("worker", 5, 1, "dataset.workers: a process that reads images died"),
        ("study", 5, -signal.SIGKILL, ""),
        ("everybody", 5, 128 + signal.SIGTERM, "SIGTERM in large, epoch 2 of 3: saved"),
    ],
)
def test_whoever_dies_in_the_middle_of_an_epoch_the_same_command_goes_on(
    victim: str, count: int, status: int, words: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    assert start(tmp_path / "whole", root, "nobody", 0).wait(120) == 0
    broken = start(tmp_path / "broken", root, victim, count)
    _, errors = broken.communicate(timeout=120)
    assert broken.returncode == status, errors
    assert words in errors
    assert "Traceback" not in errors
    assert children_are_gone(broken.pid), "no worker stays behind"
    assert list((tmp_path / "broken/store").rglob("checkpoint-000001-*")), "what was done is kept"
    assert start(tmp_path / "broken", root, "nobody", 0).wait(120) == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_a_plan_needs_no_files_and_takes_weights_of_torchvision_into_account(tmp_path: Path) -> None:
    arguments = ["experiment=l1_resnet34_a_imagenet", "dry_run=true", "device=cpu", f"store.root={tmp_path}"]
    plan = plan_of(configure(*arguments))
    assert plan["large"]["train_flops"] == 6 * plan["large"]["macs"] * 90 * 1_281_167
    file = tmp_path / "resnet34.pth"
    torch.save(resnet34().state_dict(), file)
    imported = plan_of(configure(*arguments, f"large.checkpoint={file}"))
    assert not imported["large"]["trained"]
    assert imported["large"]["train_flops"] == 0
    # Lengths still come from the recipe; what the weights have cost is not known.
    tuned = {**plan["arms"]["finetune"], "train_flops_total": None}
    assert imported["arms"] == {**plan["arms"], "finetune": tuned}


def test_the_modern_recipe_differs_from_the_papers(tmp_path: Path) -> None:
    arguments = ["experiment=l1_resnet34_a_imagenet", "dry_run=true", "device=cpu", f"store.root={tmp_path}"]
    paper, modern = (configure(*arguments, f"recipe={name}").recipe for name in ("imagenet", "imagenet_modern"))
    assert (paper.schedule, paper.step, paper.weight_decay, paper.decay_norms) == ("step", 30, 1e-4, True)
    assert (paper.warmup, paper.label_smoothing) == (0, 0.0)
    assert (modern.schedule, modern.warmup, modern.label_smoothing) == ("cosine", 5, 0.1)
    assert not modern.decay_norms
    assert modern.epochs == paper.epochs == 90
    assert modern.finetune.lr == modern.lr
