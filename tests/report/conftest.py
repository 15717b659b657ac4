"""Run folders as studies leave them, without the studies: seeds, accuracies and settings as a test wants them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.report.__main__ import main
from rethink_prune.store.metrics import write_metrics

WriteRun = Callable[..., Path]

PICTURES = {"name": "voc", "lr": 0.001, "fingerprint": "abc", "classes": ["cat", "dog"], "test_pictures": 4952}


def writer(root: Path) -> WriteRun:
    """Return a function that writes a run folder and its stages below `root`, from last-epoch accuracies by arm.

    Of `epochs`, each arm that is not named has four; `same` names arms that are other names of a training. `params` and
    `macs` are those of the pruned network; the unpruned one has 200 and 1,000. `transfer` has the mAP of each detector,
    which has three epochs; `pictures` are the settings of the transfer.
    """

    def write(
        seed: int,
        top1: Mapping[str, float | str],
        *,
        folder: str | None = None,
        large_stage: str | None = None,
        settings: Mapping[str, Any] | None = None,
        processes: Mapping[str, list[int]] | None = None,
        epochs: Mapping[str, int] | None = None,
        same: Mapping[str, str] | None = None,
        params: int = 50,
        macs: int = 400,
        rounds: Sequence[Mapping[str, Any]] = (),
        transfer: Mapping[str, float | str] | None = None,
        pictures: Mapping[str, Any] | None = None,
        **study: Any,
    ) -> Path:
        place = root / "runs" / (folder or f"run{len(list((root / 'runs').glob('*')))}")
        place.mkdir(parents=True, exist_ok=True)
        target = study.pop("target", {"ratio": 0.5})
        recipe = {"name": "paper", "lr": 0.1, **(settings or {}).get("recipe", {})}
        described = {
            "experiment": None,
            "dataset": "cifar10",
            "train_images": 50_000,
            "test_images": 10_000,
            "model": "vgg16",
            "pruner": "l1",
            "target": target,
            "recipe": "paper",
            "budget": "paper",
            "seed": seed,
            "device": "CPU",
            "precision": "fp32",
            "arms": ["finetune", "scratch_e", "scratch_b"],
            "settings": {
                "dataset": {"train_limit": None},
                **(settings or {}),
                "recipe": recipe,
                **({} if transfer is None else {"transfer": {**PICTURES, **(pictures or {})}}),
            },
            "versions": {"torch": "2.15.0"},
            "ledger": {"macs_reference": 1000},
            **study,
        }

        def entry(arm: str, value: float | str) -> dict[str, Any]:
            if isinstance(value, str):
                return {"status": "failed", "reason": value, "epoch": 2}
            name = large_stage if arm == "large" and large_stage else f"{arm}-{seed}-{value}-{json.dumps(target)}"
            stage = root / "stages" / name
            stage.mkdir(parents=True, exist_ok=True)
            length = (epochs or {}).get(arm, 4)
            rows = [{"epoch": e, "test_top1": value - 10 / e**2 + 10 / length**2} for e in range(1, length + 1)]
            write_metrics(stage, rows)
            own = length * (5e14 if arm == "large" else 2.5e14)
            follows = arm.startswith(("finetune", "retrain", "lottery", "weight_rewind", "lr_rewind"))
            before = 5e14 * (epochs or {}).get("large", 4) if follows else 0
            before += sum(each["train_flops"] or 0 for each in rounds) if follows else 0
            return {
                "status": "done",
                "top1": value,
                "top1_best": value + 0.1,
                "epochs": length,
                "params": 200 if arm == "large" else params,
                "macs": 1000 if arm == "large" else macs,
                "train_flops": own,
                "train_flops_total": own + before,
                "stage": str(stage),
                **({"processes": processes[arm]} if processes else {}),
            }

        def detector(start: str, value: float | str) -> dict[str, Any]:
            if isinstance(value, str):
                return {"status": "failed", "reason": value, "epoch": 2}
            data = f"{PICTURES | (pictures or {})}"
            stage = root / "stages" / f"detect-{start}-{seed}-{value}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
            stage.mkdir(parents=True, exist_ok=True)
            columns = {"lr": 0.001, "images": 100, "train_loss": 0.5, "processes": 1, "seconds": 1.0}
            write_metrics(stage, [{"epoch": e, **columns, "test_map": value - 3 + e} for e in (1, 2, 3)])
            return {
                **{"status": "done", "map": value, "map_best": value + 0.5, "best_epoch": 2, "loss": 0.5},
                "ap": {"cat": value - 10, "dog": value + 10},
                **{"epochs": 3, "params": 1500, "macs": 30_000, "train_flops": 3e15, "train_flops_total": 8e15},
                **{"seconds": 3.0, "stage": str(stage), "processes": [1]},
            }

        summary: dict[str, Any] = {"study": described}
        arms = {arm: entry(arm, value) for arm, value in top1.items()}
        arms |= {alias: arms[arm] for alias, arm in (same or {}).items()}
        if "large" in arms:
            summary["large"] = arms.pop("large")
        layers = [{"layer": f"features.{i}", "kept": 16 + i, "full": 32} for i in range(3)]
        summary |= {"pruned": {"params": params, "macs": macs, "top1": 20.0, "layers": layers}, "arms": arms}
        if rounds:
            summary["rounds"] = list(rounds)
        if transfer is not None:
            summary["transfer"] = {start: detector(start, value) for start, value in transfer.items()}
        (place / "summary.json").write_text(json.dumps(summary))
        return place

    return write


@pytest.fixture(scope="session")
def writer_below() -> Callable[[Path], WriteRun]:
    """Return a function that makes such a function for a folder."""
    return writer


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes runs below the test's folder."""
    return writer(tmp_path)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report over two targets, three seeds each, and a row of the paper; not to be changed."""
    root = tmp_path_factory.mktemp("written")
    write = writer(root)
    for seed in range(3):
        for ratio in (0.3, 0.5):
            top1 = {"large": 94 - 0.1 * seed, "finetune": 93 + ratio, "scratch_e": 92.5 + 0.1 * seed, "scratch_b": 94.0}
            write(seed, top1, target={"ratio": ratio})
    write(0, {"large": 93.6, "scratch_b": 93.9}, experiment="l1_vgg16_cifar10", target={"variant": "A"})
    assert main([str(root / "runs"), "--out", str(root / "report")]) == 0
    return root / "report"
