"""A study's metrics, table and TensorBoard files, read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rethink_prune.store.metrics import read_metrics, write_metrics
from rethink_prune.study.tables import COLUMNS, study_rows

Run = Callable[..., dict[str, Any]]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_metrics_keep_every_digit(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "test_top1": 1 / 3}, {"epoch": 2, "test_top1": 0.1 + 0.2}]
    write_metrics(tmp_path, rows)
    assert read_metrics(tmp_path) == rows


def test_arms_overlay_in_tensorboard_by_epoch_and_by_computation(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[finetune,scratch_e]", "recipe.finetune.epochs=2")
    for attempt in ("run1", "run2"):
        folder = tmp_path / attempt / "tensorboard"
        for arm in ("finetune", "scratch_e"):
            entry = summary["arms"][arm]
            read = events(folder / arm)
            tags = read.Tags()["scalars"]
            by_epoch = read.Scalars("accuracy top-1 by epoch/test")
            assert [point.step for point in by_epoch] == [1, 2]
            assert by_epoch[-1].value == pytest.approx(entry["top1"])
            by_flops = read.Scalars("accuracy top-1 by training GFLOPs/test")
            assert by_flops[-1].step == round(entry["train_flops_total"] / 1e9)
            assert by_flops[-1].value == pytest.approx(entry["top1"])
            assert {"loss by epoch/test", "loss by epoch/train", "accuracy top-1 by epoch/train", "lr"} <= set(tags)
            assert sorted(tags)[0].startswith("accuracy top-1 by epoch")
        assert events(folder / "hparams").Scalars("top1/finetune")[0].value == pytest.approx(
            summary["arms"]["finetune"]["top1"]
        )
        small_study("arms=[finetune,scratch_e]", "recipe.finetune.epochs=2")  # reused stages appear as well


def test_table_of_a_study() -> None:
    network = {"params": 1000, "macs": 2_500_000}
    done = {"status": "done", **network, "top1": 90.0, "epochs": 3, "seconds": 1.25}
    summary = {
        "large": {**done, "train_flops": 5e12, "train_flops_total": 5e12},
        "pruned": {**network, "top1": 12.5},
        "arms": {
            "finetune": {**done, "top1": 90.5, "train_flops": 1e12, "train_flops_total": 6e12},
            "scratch_b": {"status": "failed", "reason": "nan", "epoch": 2},
        },
    }
    large, pruned, finetune, scratch_b = (dict(zip(COLUMNS, row, strict=True)) for row in study_rows(summary))
    assert large["top-1 %"] == "90.00"
    assert large["vs large"] == ""
    assert pruned["vs large"] == "-77.50"
    assert finetune["vs large"] == "+0.50"
    assert finetune["parameters"] == "1,000"
    assert finetune["MACs"] == "2.50 M"
    assert (finetune["training FLOPs"], finetune["total FLOPs"]) == ("1e+12", "6e+12")
    assert scratch_b["top-1 %"] == "failed"
