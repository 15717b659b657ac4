"""What pruning leaves: widths by layer and layer stage, and kept positions of kernels."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import SMALL, configure
from rethink_prune.patterns import main
from rethink_prune.report.__main__ import main as report
from rethink_prune.report.gather import gather, read_kernels
from rethink_prune.report.groups import group_runs
from rethink_prune.report.patterns import RowPattern, row_pattern
from rethink_prune.study.run import run_study
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.interrupts import Interrupts

WriteRun = Callable[..., Path]
RESNET20 = {"name": "resnet20", "options": {}, "num_classes": 10, "in_channels": 3, "image_size": 16}
OWN_NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.c1 = nn.Conv2d(3, 4, 3)
        self.c2 = nn.Conv2d(4, 4, 3, stride=2)
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(self.c2(self.c1(x).relu()).relu().mean((2, 3)))
"""


def write_layers(
    write: WriteRun, seed: int, layers: Mapping[str, tuple[int, int]], network: Mapping[str, Any], **options: Any
) -> None:
    """Write a run of a network whose layers keep so many of so many."""
    settings = {"model": dict(network)}
    folder = write(seed, {"scratch_e": 90.0}, model=network["name"], settings=settings, **options)
    content = json.loads((folder / "summary.json").read_text())
    content["pruned"]["layers"] = [{"layer": name, "kept": kept, "full": full} for name, (kept, full) in layers.items()]
    (folder / "summary.json").write_text(json.dumps(content))


def only_pattern(place: Path, factory: Callable[..., Any] | None = None) -> RowPattern:
    (group,) = group_runs(gather([place], masks=True).runs)
    return row_pattern(group, 1, factory)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_layer_stage_is_the_layers_of_one_size_and_its_average_is_over_layers_then_seeds(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed, kept in enumerate(((8, 4, 8), (4, 4, 24))):
        names = ("layer1.0.conv1", "layer1.1.conv1#2", "layer2.0.bn1.selected")
        layers = dict(zip(names, zip(kept, (16, 8, 32), strict=True), strict=True))
        write_layers(write_run, seed, layers, RESNET20)
    found = only_pattern(tmp_path / "runs")
    # Over the layers 6 and 4 of 12, as shares 50 and 37.5 percent.
    large, small = found.stages
    assert (large.size, large.layers, large.full) == ("16 x 16", 2, 12)
    assert (large.width.mean, large.width.sd, large.width.n) == (5, pytest.approx(2**0.5), 2)
    assert (large.share.mean, large.share.sd) == (43.75, pytest.approx(12.5 / 2**0.5))
    assert (small.size, small.layers, small.width.mean, small.share.mean) == ("8 x 8", 1, 16, 50)
    width = found.widths[2]
    assert (width.kept, width.sd, width.n, width.size) == (16, pytest.approx(16 / 2**0.5), 2, "8 x 8")
    assert found.unknown == ""


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a store with two seeds whose single weights are gone; not to be changed."""
    home = tmp_path_factory.mktemp("masked")
    for seed in (0, 1):
        words = ("pruner=magnitude", "pruner.ratio=0.8", "recipe.epochs=1", "arms=[scratch_e]", f"seed={seed}")
        with Interrupts() as interrupts:
            run_study(configure(*SMALL, *words, f"store.root={home / 'store'}"), home / f"run{seed}", interrupts)
    return home


def test_maps_are_those_of_the_masks_averaged_over_the_layers_of_a_stage_and_over_seeds(masked: Path) -> None:
    found = only_pattern(masked / "store")
    stages = list((masked / "store/stages").glob("prune-*"))
    assert len(stages) == 2
    last = [
        mask.double().mean((0, 1)).numpy()
        for stage in stages
        for name, mask in Architecture.load(stage).masks.items()
        if name.startswith("layer3.")
    ]
    assert [(p.size, p.kernel, p.layers, p.n) for p in found.kernels] == [
        *(("8 x 8", "3 x 3", 7, 2), ("4 x 4", "3 x 3", 6, 2), ("2 x 2", "3 x 3", 6, 2)),
    ]
    np.testing.assert_allclose(found.kernels[2].kept, np.mean(last, axis=0))
    # The share of positions that remain is the share of weights that do.
    np.testing.assert_allclose(100 * np.mean(found.kernels[0].kept), found.stages[0].share.mean)


def test_a_report_shows_patterns_and_keeps_them_where_the_store_is_gone(masked: Path, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(masked, home)
    assert report([str(home / "store"), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report/kernels-01-resnet20-magnitude-ratio-0-8.svg").exists()
    (kernels, *_) = rows_of(tmp_path / "report/kernels-1.csv")
    assert {f"kept, % {row},{column}" for row in (1, 2, 3) for column in (1, 2, 3)} < kernels.keys()
    assert [row["layer stage"] for row in rows_of(tmp_path / "report/stages-1.csv")] == ["8 x 8", "4 x 4", "2 x 2"]
    shutil.rmtree(home)
    # Its own results are enough.
    assert main([str(tmp_path / "report/results.json"), "--out", str(tmp_path / "patterns")]) == 0
    assert only_pattern(tmp_path / "report/results.json") == only_pattern(masked / "store")


def test_damaged_masks_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "architecture.safetensors").write_bytes(b"no tensors")
    assert read_kernels(tmp_path / "architecture.safetensors") == []


def test_the_command_writes_tables_and_pictures_and_takes_old_ones_away(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5):
        write_layers(write_run, 0, {"layer1.0.conv1": (8, 16)}, RESNET20, target={"ratio": ratio})
    arguments = ["--out", str(tmp_path / "patterns")]
    assert main([str(tmp_path / "runs"), *arguments]) == 0
    names = {"patterns.json", "widths.csv", "stages.csv"}
    pictures = [f"widths-0{n}-resnet20-l1-ratio-0-{ratio}" for n, ratio in ((1, 3), (2, 5))]
    both = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "patterns").iterdir()} == names | both
    (row, _) = rows_of(tmp_path / "patterns/widths.csv")
    assert (row["layer"], row["size"], row["kept"], row["kept, %"]) == ("layer1.0.conv1", "16 x 16", "8.0", "50.0")
    assert main([str(tmp_path / "runs/run0"), *arguments]) == 0
    left = {f"{pictures[0]}.{kind}" for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "patterns").iterdir()} == names | left


def test_stages_of_a_users_network_need_its_factory(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "patterns_own_net.py").write_text(OWN_NET + "open('imported', 'w')\n")
    monkeypatch.chdir(tmp_path)
    layers = {"c1": (2, 4), "c2": (1, 4)}
    write_layers(write_run, 0, layers, {**RESNET20, "name": "patterns_own_net:Net"})
    assert main(["runs"]) == 0
    assert "layer stages are not known: patterns_own_net:Net is a network of your own" in capsys.readouterr().out
    assert not Path("imported").exists()
    assert not Path("patterns/stages.csv").exists()
    assert report(["runs"]) == 0
    assert "layer stages are not known: patterns_own_net:Net is a network of your own" in capsys.readouterr().out
    assert not Path("imported").exists()
    assert main(["runs", "--factory", "patterns_own_net:Net"]) == 0
    assert [(row["layer stage"], float(row["kept"])) for row in rows_of(Path("patterns/stages.csv"))] == [
        ("14 x 14", 2),
        ("6 x 6", 1),
    ]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"name": "resnet20"}, "layer stages are not known: resnet20: its summary describes no network"),
        ({**RESNET20, "options": {"depth": 3}}, "layer stages are not known: model.depth: resnet20 has no such option"),
        ({**RESNET20, "name": "vgg11"}, "the size of layer1.0.conv1 is not known: vgg11 as built has no such layer"),
    ],
)
def test_what_is_not_known_of_a_network_is_said(
    network: dict[str, Any], said: str, write_run: WriteRun, tmp_path: Path
) -> None:
    write_layers(write_run, 0, {"layer1.0.conv1": (8, 16)}, network)
    found = only_pattern(tmp_path / "runs")
    assert found.unknown.startswith(said)
    assert (found.stages, found.widths[0].size) == ((), "")


def test_runs_without_layers_are_refused_in_words(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_layers(write_run, 0, {}, RESNET20)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "patterns")]) == 1
    assert capsys.readouterr().err == "these runs recorded no layers; run a study until it has pruned\n"
    assert not (tmp_path / "patterns").exists()
