"""What arms are called and how they are drawn: an arm's entry in `ARMS` is all that a new one needs."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from rethink_prune.report.__main__ import main
from rethink_prune.report.networks import in_column_order, network_label
from rethink_prune.study.arms import ARMS, Arm, Style

WriteRun = Callable[..., Path]


@pytest.fixture
def new_arm(monkeypatch: pytest.MonkeyPatch) -> Arm:
    """Return an arm that the report has never seen, and which is in `ARMS` for this test."""
    style = Style("#D55E00", (0, (2, 7)), "*")
    arm = Arm(
        "pruned",
        "inherited",
        "finetune",
        title="replayed",
        name="training from replayed weights",
        meaning="",
        style=style,
    )
    monkeypatch.setitem(cast("dict[str, Arm]", ARMS), "replay", arm)
    return arm


def test_a_new_arm_brings_its_title_name_and_style(new_arm: Arm, write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(seed, {"large": 94.0, "finetune": 93.0, "replay": 93.5 + seed}, arms=["finetune", "replay"])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    accuracies, differences = (
        next(csv.DictReader((tmp_path / f"report/{name}-1.csv").open())) for name in ("accuracy", "differences")
    )
    assert accuracies["replayed"] == "94.0"
    assert (differences["arm"], differences["against"]) == ("replayed", "fine-tuned")
    text = (tmp_path / "report/report.md").read_text()
    pair = "Training from replayed weights and fine-tuning (paper recipe, paper budget, fp32)"
    assert f"Undecided: {pair} are shown neither to differ" in text
    (curves,) = (tmp_path / "report").glob("curves-*.svg")
    # The band and the line of the curve; dashes are drawn in units of the line's width, 1.5 points.
    assert "fill: #d55e00" in curves.read_text()
    assert "stroke-dasharray: 3,10.5; stroke-dashoffset: 0; stroke: #d55e00" in curves.read_text()


def test_a_new_arm_of_the_unpruned_network_is_a_control(
    new_arm: Arm, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Arm("large", "fresh", "scratch_b", title="control", name="the control", meaning="", style=new_arm.style)
    monkeypatch.setitem(cast("dict[str, Arm]", ARMS), "replay", control)
    write_run(0, {"finetune": 93.0, "replay": 99.0, "scratch_b": 94.0}, arms=["finetune", "replay", "scratch_b"])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    rows = csv.DictReader((tmp_path / "report/differences-1.csv").open())
    assert [row["arm"] for row in rows] == ["Scratch-B"]


def test_new_arms_have_columns_after_those_of_the_paper(new_arm: Arm) -> None:
    names = {"pruned", "sparse", "replay", "unknown", "large", "scratch_b", "finetune", "scratch_e"}
    assert in_column_order(names) == [
        *("large", "finetune", "scratch_e", "scratch_b", "unknown", "replay", "sparse", "pruned")
    ]


def test_networks_are_told_apart_by_color_and_marker() -> None:
    styles = [network_label(name).style for name in (*ARMS, "large", "sparse", "prune_d", "unknown")]
    for part in ("color", "dashes", "marker"):
        assert len({getattr(style, part) for style in styles}) == len(styles)


def test_results_are_computed_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, rethink_prune.report.documents; "
        "print(sorted({'torch', 'torchvision', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
