"""A sensitivity scan: each number is that of a study which prunes that layer alone, and nothing else is touched."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import SMALL, configure
from rethink_prune import count_cost, load_model, prune
from rethink_prune.config import DatasetConfig
from rethink_prune.data import eval_batches, load_dataset
from rethink_prune.files import file_digest
from rethink_prune.finished.sensitivity import SensitivityRow, SensitivityScan, sensitivity_text
from rethink_prune.report.sensitivity_plot import _scan_figure
from rethink_prune.sensitivity import main
from rethink_prune.study.run import run_study
from rethink_prune.training.evaluate import evaluate
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.runtime import Runtime

ON_CPU = ("--device", "cpu", "--precision", "fp32")
DIGITS = ("dataset=digits", "dataset.image_size=8", "dataset.train_limit=200", "dataset.test_limit=100")
TRAINED = (*SMALL, "recipe.epochs=4", "arms=[finetune]")
# So little that no channel goes; and shares that leave something to tell apart.
RATIOS = (1e-12, 0.5, 0.9)
OWN_NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.add_module("c[1]", nn.Conv2d(3, 4, 3))
        self.c1 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(self.c1(getattr(self, "c[1]")(x).relu()).relu().mean((2, 3)))
"""
OWN_PRUNER = """
import torch
from rethink_prune.pruning import ChannelPruner
open("imported", "w")
class LastChannels(ChannelPruner):
    def scores(self, model, groups, *, data, generator):
        return {group.name: -torch.arange(group.size, dtype=torch.float64) for group in groups}
"""
Summary = dict[str, Any]


def study(home: Path, name: str, *overrides: str) -> Summary:
    with Interrupts() as interrupts:
        return run_study(configure(*TRAINED, f"store.root={home / 'store'}", *overrides), home / name, interrupts)


def scanned(source: Path | str, out: Path, *options: str, ratios: Sequence[float] = (0.5,)) -> dict[str, Any]:
    shares = ",".join(map(str, ratios))
    assert main([str(source), *ON_CPU, "--ratios", shares, "--out", str(out), *options]) == 0
    return json.loads((out / "sensitivity.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store and a finished run, ``run``, pruned by L1 norm."""
    folder = tmp_path_factory.mktemp("home")
    study(folder, "run")
    return folder


@pytest.fixture(scope="module")
def summary(home: Path) -> Summary:
    return json.loads((home / "run/summary.json").read_text())


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    """Return what the scan of the run found; it is in ``scan``."""
    return scanned(home / "run", home / "scan", ratios=RATIOS)


def row(content: dict[str, Any], layer: str, ratio: float) -> dict[str, Any]:
    (it,) = [row for row in content["rows"] if (row["layer"], row["ratio"]) == (layer, ratio)]
    return it


def test_it_says_what_was_scanned_and_on_what(found: dict[str, Any], summary: Summary) -> None:
    large = summary["large"]
    expected = {
        "format": "rethink-prune sensitivity 1",
        "stage": Path(large["stage"]).name,
        "network": "resnet20",
        "dataset": "digits",
        "seed": 0,
        "precision": "fp32",
        "test_images": 100,
        "train_images": 200,
        "top1": large["top1"],
        "macs": large["macs"],
    }
    assert {name: found[name] for name in expected} == expected
    assert found["pruner"]["name"] == "l1"
    layers = [width["layer"] for width in summary["pruned"]["layers"]]
    assert [(row["layer"], row["ratio"]) for row in found["rows"]] == [(name, r) for name in layers for r in RATIOS]


@pytest.mark.parametrize(
    ("pruner", "layer"),
    [
        ("l1", "layer1.0.conv1"),
        ("magnitude", "layer2.0.conv2"),
        ("thinet", "layer1.1.conv1"),
        ("slimming", "layer3.1.conv1"),
    ],
)
def test_a_row_is_what_a_study_finds_that_prunes_that_layer_alone(
    pruner: str, layer: str, home: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    if pruner == "slimming":  # trains the network itself: the run must have done so
        study(home, "sparse", "pruner=slimming")
        content = scanned(home / "sparse", tmp_path / "out")
    else:
        content = found if pruner == "l1" else scanned(home / "run", tmp_path / "out", "--pruner", pruner)
    ranking = {"thinet": (), "magnitude": ("pruner.distribution=uniform",)}.get(pruner, ("pruner.ranking=layer",))
    alone = study(home, f"alone-{pruner}", f"pruner={pruner}", *ranking, f"pruner.ratio={{{layer}: 0.5}}")["pruned"]
    it = row(content, layer, 0.5)
    expected = {name: alone[name] for name in ("top1", "top1_recalibrated", "macs")}
    assert {name: it[name] for name in expected} == expected
    (width,) = [width for width in alone["layers"] if width["kept"] != width["full"]]
    assert {name: it[name] for name in width} == width


def test_a_row_is_what_prune_gives_in_python_with_all_other_layers_whole(
    found: dict[str, Any], summary: Summary, tmp_path: Path
) -> None:
    large = load_model(summary["large"]["stage"])
    options, cpu = DatasetConfig(name="digits", image_size=8, train_limit=200, test_limit=100), torch.device("cpu")
    dataset = load_dataset(options, cache_dir=tmp_path)
    batches = eval_batches(dataset, dataset.test, batch_size=100, device=cpu)
    top1s = set()
    for layer in ("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"):
        result = prune(large, "l1", example=torch.zeros(1, 3, 8, 8), ratio={layer: 0.9})
        assert [width.layer for width in result.report.layers if width.kept < width.full] == [layer]
        it = row(found, layer, 0.9)
        assert it["macs"] == count_cost(result.model, (3, 8, 8)).macs < found["macs"]
        assert it["top1"] == evaluate(result.model, batches, runtime=Runtime(cpu, "fp32")).top1
        top1s.add(it["top1"])
    assert len(top1s) > 1, "layers that differ in nothing show nothing"


def test_a_ratio_that_leaves_every_channel_leaves_the_unpruned_network(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if row["ratio"] == RATIOS[0]]
    assert len(rows) == 9
    for it in rows:
        assert it["kept"] == it["full"]
        assert {name: it[name] for name in ("top1", "top1_recalibrated", "macs")} == {
            name: found[name] for name in ("top1", "top1_recalibrated", "macs")
        }


def test_nothing_in_the_store_changes_and_a_second_scan_finds_the_same(
    found: dict[str, Any], home: Path, tmp_path: Path, summary: Summary
) -> None:
    """By the stage's folder as well, with the images named as a study names them."""
    stages = home / "store/stages"
    before = {file: file_digest(file) for file in stages.rglob("*") if file.is_file()}
    again = scanned(summary["large"]["stage"], tmp_path / "out", "--dataset", *DIGITS)
    assert {file: file_digest(file) for file in stages.rglob("*") if file.is_file()} == before
    assert again["rows"] == [row for row in found["rows"] if row["ratio"] == 0.5]
    assert again["top1_recalibrated"] == found["top1_recalibrated"]


def test_the_folder_holds_table_and_picture(found: dict[str, Any], home: Path) -> None:
    folder = home / "scan"
    names = {"sensitivity.json", "sensitivity.csv", "sensitivity.png", "sensitivity.svg"}
    assert {file.name for file in folder.iterdir()} == names
    with (folder / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in it.items()} for it in found["rows"]]


def scan_of(losses: dict[str, tuple[float, float]]) -> SensitivityScan:
    """Return a scan in which layers lose so many points at two ratios, and ten times as many as pruned."""
    rows = [
        SensitivityRow(layer, ratio, 8, 16, 90 - 10 * loss, 90 - loss, 750)
        for layer, both in losses.items()
        for ratio, loss in zip((0.5, 0.9), both, strict=True)
    ]
    return SensitivityScan(
        *("large-0", "net", "digits", {"name": "l1"}, 0, "CPU", "fp32", 200, 400, 90.0, 90.0, 1000), rows=tuple(rows)
    )


def test_the_table_has_the_most_sensitive_layer_first_and_says_what_an_image_counts() -> None:
    text = sensitivity_text(scan_of({"a": (0.5, 1.0), "b": (0.0, 3.0), "c": (0.75, 1.0), "d": (0.0, 0.0)}))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[0] == ["layer", "width", "MACs saved at 0.9", "0.5", "0.9"]
    assert [line[0] for line in cells[2:]] == ["b", "c", "a", "d"]
    assert cells[3] == ["c", "16", "25.00 %", "-7.50 / -0.75", "-10.00 / -1.00"]
    assert "one is 0.50 points" in text
    assert "pruner.skip=[b,c,a]" in text


@pytest.mark.parametrize(("count", "named"), [(1, 1), (50, 50), (150, 50)])
def test_every_layer_has_a_line_in_both_panels_and_names_that_do_not_overlap(count: int, named: int) -> None:
    found = scan_of({f"layer{place}": (0.0, place / 100) for place in range(count)})
    figure = _scan_figure(found, "title")
    figure.canvas.draw()
    pruned, recalibrated, bar = figure.axes
    for axes, factor in ((pruned, 10), (recalibrated, 1)):
        ends = [line.get_ydata()[-1] for line in axes.lines if len(line.get_xdata()) == 3]
        assert ends == pytest.approx([90 - factor * place / 100 for place in range(count)])
        assert len({line.get_color() for line in axes.lines}) == count + 1  # and the unpruned network
    labels = bar.get_yticklabels()
    assert len(labels) == named
    assert labels[0].get_text() == "layer0"
    boxes = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in labels))
    assert all(lower[1] <= upper[0] + 1 for lower, upper in pairwise(boxes))


def test_a_scan_is_written_over_an_earlier_one_of_its_own_alone(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: dict[str, Any]
) -> None:
    out = shutil.copytree(home / "scan", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sensitivity.json").write_text("precious")
    for options in (("--out", str(tmp_path / "mine")), ("--out", str(out), "--pruner", "random")):
        capsys.readouterr()
        assert main([str(home / "run"), *ON_CPU, *options]) == 1
        assert capsys.readouterr().err == f"--out {options[1]}: holds something else already; name another folder\n"
    assert (tmp_path / "mine/sensitivity.json").read_text() == "precious"
    assert scanned(home / "run", out, "--limit", "50", ratios=(0.9,))["test_images"] == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratios", "1.2"), "--ratios 1.2: must be shares in (0, 1)"),
        (("--ratios", "0.5,x"), "--ratios 0.5,x: must be shares in (0, 1)"),
        (("--ratios", "nan"), "--ratios nan: must be shares in (0, 1)"),
        (("--ratios", "1e-12"), "removes nothing"),
        (("--pruner", "nonsense"), "pruner.name=nonsense: no such pruner"),
        (("--pruner", "sss"), "sss: cannot prune one layer by a ratio (pruner.ratio=0.5: sss takes no ratio"),
        (("--pruner", "soft_filter"), "--pruner soft_filter: prunes networks that it has trained its own way; give a "),
        (("--limit", "1000"), "--limit 1000: there are only 100 test images"),
        (("--dataset", "dataset=cifar10"), "has 32 pixels a side (dataset.image_size), not 8"),
        (("--dataset", "model=vgg11"), "--dataset model=vgg11: only the data set can be set"),
        (("--factory", "no.such:net"), "no module named no"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    options: tuple[str, ...], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([str(home / "run"), *ON_CPU, "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_holds_no_unpruned_network_is_refused_in_one_line(
    home: Path, summary: Summary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(home, "scratch", "arms=[scratch_e]", "recipe.epochs=1", "seed=1")
    for name in ("damaged", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/summary.json").write_text("{")
    (tmp_path / "old/summary.json").write_text('{"study": {"seed": 0}}')
    images = ("--dataset", *DIGITS)
    for folder, options, message in (
        (home / "nowhere", (), "no such folder"),
        (home / "scratch", (), "has no finished large network; run it again with large.baseline=true"),
        (tmp_path / "damaged", (), "summary.json: is damaged"),
        (tmp_path / "old", (), "summary.json: is damaged or of an earlier version"),
        (home / "store", images, "is no stage"),
        (summary["arms"]["finetune"]["stage"], images, "holds a pruned network; give the stage large"),
        (summary["large"]["stage"], (), "a stage does not say which images: --dataset"),
    ):
        capsys.readouterr()
        assert main([str(folder), *ON_CPU, "--out", str(tmp_path / "out"), *options]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_networks_and_pruners_of_ones_own_are_those_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scan_net.py").write_text(OWN_NET)
    (tmp_path / "own_scan_pruner.py").write_text(OWN_PRUNER)
    own = ("model.name=own_scan_net:Net", "pruner.name=own_scan_pruner:LastChannels", "recipe.epochs=1")
    large = study(tmp_path, "run", *own)["large"]
    sys.modules.pop("own_scan_pruner")
    Path("imported").unlink()
    factory, pruner = ("--factory", "own_scan_net:Net"), ("--pruner", "own_scan_pruner:LastChannels")
    for options, message in (
        (factory, "was pruned by a pruner of your own; name it: --pruner own_scan_pruner:LastChannels"),
        (("--pruner", "l1"), "holds own_scan_net:Net, a network of your own"),
    ):
        capsys.readouterr()
        assert main(["run", *ON_CPU, *options]) == 1
        assert message in capsys.readouterr().err
    assert not Path("imported").exists()
    found = scanned("run", Path("out"), *factory, *pruner)
    # The name of the first reads, as a pattern, as that of the second.
    assert [(row["layer"], row["kept"], row["full"]) for row in found["rows"]] == [("c[1]", 2, 4), ("c1", 2, 4)]
    assert found["rows"][0]["macs"] == large["macs"] - (2 * 3 * 9 * 36 + 2 * 4 * 9 * 16)
    # Without batch norms there is nothing to estimate.
    assert all(row["top1"] == row["top1_recalibrated"] for row in found["rows"])


def test_images_of_ones_own_are_those_the_user_names(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    content = json.loads((run / "summary.json").read_text())
    content["study"]["settings"]["dataset"]["name"] = "evil_images:images"
    (run / "summary.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main([str(run), *ON_CPU]) == 1
    assert "has images of your own; say what reads them: --dataset dataset.name=evil" in capsys.readouterr().err
