"""Detectors in a report: their table, what is compared, what keeps runs apart, and what is shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from rethink_prune.errors import UserError
from rethink_prune.files import DETECTIONS_FILE
from rethink_prune.report.__main__ import main
from rethink_prune.report.detection import DetectionTable
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import RunGroup, group_runs
from rethink_prune.report.plots import _detection_figures
from rethink_prune.report.results import ResultTable, compute_report

WriteRun = Callable[..., Path]

TOP1 = {"large": 94.0, "finetune": 93.0, "scratch_e": 92.0, "scratch_b": 93.5}
MAP = {"unpruned": 72.0, "prune_c": 70.0, "prune_d": 71.0, "scratch_e": 69.0, "scratch_b": 71.5}


def groups_of(place: Path, **options: Any) -> list[RunGroup]:
    return group_runs(gather([place]).runs, **options)


def only_table(place: Path) -> ResultTable:
    (table,) = compute_report(groups_of(place), margin=0.5).tables
    return table


def only_detection(place: Path) -> DetectionTable:
    (detection,) = only_table(place).detection
    return detection


def write_seeds(write: WriteRun, seeds: int, **options: Any) -> None:
    """Write seeds that differ by a tenth of a point in one detector."""
    for seed in range(seeds):
        write(seed, TOP1, transfer={**MAP, "scratch_b": 71.5 + seed / 10, **options})


def test_the_table_is_the_papers_with_the_best_pruned_network_in_bold(write_run: WriteRun, tmp_path: Path) -> None:
    write_seeds(write_run, 3)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.md").read_text()
    title, table, *_ = text.split("## Detection: ")[1].split("\n\n")
    assert title == "voc (2 classes, 4,952 test pictures), paper recipe, paper budget, fp32"
    heading, _, row = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert heading == ["network", "pruned by", "unpruned", "Prune-C", "Prune-D", "Scratch-E", "Scratch-B"]
    means = ["72.00 ± 0.00 (3)", "70.00 ± 0.00 (3)", "71.00 ± 0.00 (3)", "69.00 ± 0.00 (3)", "**71.60 ± 0.10 (3)**"]
    assert row == ["vgg16", "l1 ratio 0.5", *means]
    assert "- Batch norms are frozen in every detector: each network keeps the statistics" in text
    assert text.count("## Detection: ") == 1
    costs = list(csv.DictReader((tmp_path / "report/detection_cost-1-1.csv").open()))
    assert [(row["detector"], float(row["training FLOPs"]), float(row["with ancestors"])) for row in costs[:2]] == [
        ("unpruned", 3e15, 8e15),
        ("Prune-C", 3e15, 8e15),
    ]
    assert not (tmp_path / "report/detection_coco-1-1.csv").exists()
    by_class = list(csv.DictReader((tmp_path / "report/detection_classes-1-1.csv").open()))
    assert [(row["class"], float(row["Scratch-E"]), row["Scratch-E n"]) for row in by_class] == [
        ("cat", 59.0, "3"),
        ("dog", 79.0, "3"),
    ]


def test_what_rows_share_is_paid_for_once(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5):
        write_run(0, TOP1, transfer=MAP, target={"ratio": ratio}, large_stage="large-0")
    rows = only_detection(tmp_path / "runs").rows
    unpruned, prune_c = (rows[0].detector(entry) for entry in ("unpruned", "prune_c"))
    assert unpruned is not None
    assert prune_c is not None
    large = 2e15  # four epochs
    assert unpruned.flops_total is not None
    assert unpruned.train_flops is not None
    # The rows share this detector, too.
    assert unpruned.flops_amortised == unpruned.flops_total - (large + unpruned.train_flops) / 2
    assert prune_c.flops_total is not None
    assert prune_c.flops_amortised == prune_c.flops_total - large / 2


def test_detectors_are_compared_seed_by_seed_in_a_family_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(8):
        noise = seed % 3 / 10
        detectors = {**MAP, "scratch_b": 71.5 + noise, "lottery": 60.0 + noise}
        # Differences between arms that are as clear take no part in the correction.
        write_run(seed, {**TOP1, "lottery": 80.0 + noise}, transfer=detectors)
    table = only_table(tmp_path / "runs")
    (row,) = table.detection[0].rows
    assert [(each.first, each.second) for each in row.comparisons] == [
        *(("scratch_e", "prune_c"), ("scratch_e", "prune_d"), ("scratch_b", "prune_c"), ("scratch_b", "prune_d")),
        ("lottery", "prune_c"),
    ]
    against_pruned = row.comparisons[2]
    assert against_pruned.difference is not None
    assert (against_pruned.difference.n, round(against_pruned.difference.mean, 6)) == (8, 1.5875)
    assert against_pruned.difference.p == 2 / 2**8
    assert against_pruned.p_holm == pytest.approx(5 * 2 / 2**8)
    assert against_pruned.verdict == (
        "Scratch-B is better than Prune-C (mAP on voc, paper recipe, paper budget, fp32) by 1.59 points "
        "[1.52, 1.66], n = 8."
    )
    of_arms = table.rows[0].comparisons
    assert {comparison.p_holm for comparison in of_arms} == {len(of_arms) * 2 / 2**8}
    assert row.best == ("scratch_b",)


def test_what_a_seed_lacks_is_said_and_not_counted(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, TOP1, transfer=MAP)
    write_run(1, TOP1, transfer={**MAP, "prune_d": "the loss is not finite"})
    write_run(2, TOP1, transfer={"unpruned": 73.0, "prune_d": 71.0})
    (row,) = only_detection(tmp_path / "runs").rows
    assert {each.entry: each.map and each.map.n for each in row.detectors} == {
        **{"unpruned": 3, "prune_c": 2, "prune_d": 2},
        **{"scratch_e": 2, "scratch_b": 2},
    }
    assert row.notes == (
        "seed 2: the detector of Prune-C is not finished",
        "seed 1: the detector of Prune-D failed: the loss is not finite",
        "seed 2: the detector of Scratch-E is not finished",
        "seed 2: the detector of Scratch-B is not finished",
    )


def test_a_run_without_a_transfer_is_a_seed_of_the_same_row_and_brings_its_arms(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(0, TOP1)
    write_run(1, TOP1, transfer=MAP)
    # The same seed again, once a transfer was added.
    write_run(0, TOP1, transfer={**MAP, "prune_c": 70.5})
    write_run(2, TOP1)
    table = only_table(tmp_path / "runs")
    (row,) = table.rows
    assert row.seeds == (0, 1, 2)
    (detection,) = table.detection
    assert detection.rows[0].seeds == (0, 1)
    assert detection.title.startswith("voc (2 classes, 4,952 test pictures)")


def test_transfers_that_differ_make_no_row_unless_they_are_told_apart_or_mixed(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(0, TOP1, transfer=MAP)
    write_run(1, TOP1, transfer={"unpruned": 90.0}, pictures={"name": "digit_scenes", "fingerprint": "def"})
    write_run(2, TOP1)
    with pytest.raises(UserError, match=r"transfer.name \(voc in runs/run0, digit_scenes in runs/run1\)"):
        groups_of(tmp_path / "runs")
    assert [group.by for group in groups_of(tmp_path / "runs", by=["transfer.name"])] == [
        (("transfer.name", value),) for value in ("voc", "digit_scenes", "not recorded")
    ]
    (table,) = compute_report(groups_of(tmp_path / "runs", mix=True), margin=0.5).tables
    assert [row.seeds for row in table.rows] == [(0, 1, 2)]
    assert [(each.title.split(" (")[0], each.rows[0].seeds) for each in table.detection] == [
        ("voc", (0,)),
        ("digit_scenes", (1,)),
    ]


def test_two_results_of_one_detector_are_refused(write_run: WriteRun, tmp_path: Path) -> None:
    for number, value in enumerate((70.0, 71.0)):
        write_run(0, TOP1, transfer={**MAP, "prune_d": value}, folder=f"run{number}")
    with pytest.raises(UserError, match=r"seed 0 has two results: the detector of prune_d is 70\.00 after 3 epochs"):
        groups_of(tmp_path / "runs")


def test_an_arm_with_two_names_has_one_detector(write_run: WriteRun, tmp_path: Path) -> None:
    transfer = {"prune_c": 70.0, "scratch_e": 69.0, "scratch@4": 69.0}
    write_run(0, TOP1, same={"scratch@4": "scratch_e"}, transfer=transfer)
    (row,) = only_detection(tmp_path / "runs").rows
    assert [each.entry for each in row.detectors] == ["prune_c", "scratch_e"]


def test_coco_is_shown_where_all_seeds_have_it(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        run = write_run(seed, TOP1, transfer=MAP)
        summary = json.loads((run / "summary.json").read_text())
        summary["transfer"]["prune_c"]["coco"] = {"map": 40.0 + seed, "map_50": 70.0, "map_75": 41.0}
        if seed:
            summary["transfer"]["prune_d"]["coco"] = {"map": 40.0, "map_50": 70.0, "map_75": 41.0}
        (run / "summary.json").write_text(json.dumps(summary))
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    (row,) = csv.DictReader((tmp_path / "report/detection_coco-1-1.csv").open())
    assert (row["detector"], row["AP"], row["AP n"], row["AP at 0.5"]) == ("Prune-C", "40.5", "2", "70.0")


def test_the_curves_overlay_all_detectors_by_epoch_and_by_flops(write_run: WriteRun, tmp_path: Path) -> None:
    write_seeds(write_run, 2)
    with mpl.rc_context():
        differences, curves = (figure for *_, figure in _detection_figures(only_detection(tmp_path / "runs")))
    assert differences.axes[0].get_xlabel() == "points of mAP"
    by_epoch, by_flops = curves.axes
    assert by_epoch.get_ylabel() == "test mAP (%)"
    ends = {line.get_label(): line.get_xydata()[-1].tolist() for line in by_epoch.lines}
    assert {name: round(y, 6) for name, (_, y) in ends.items()} == {
        **{"unpruned": 72, "Prune-C": 70, "Prune-D": 71},
        **{"Scratch-E": 69, "Scratch-B": 71.55},
    }
    # The trainings that it builds on come first.
    assert by_flops.lines[0].get_xdata().tolist() == pytest.approx([6e15, 7e15, 8e15])


def test_the_page_shows_what_detectors_find_where_the_stages_are_there(
    write_run: WriteRun, tmp_path: Path, written: Path
) -> None:
    write_seeds(write_run, 2)
    drawn = next(written.glob("*.png")).read_bytes()
    (found,) = tmp_path.glob("stages/detect-prune_c-1-*")
    (found / DETECTIONS_FILE).write_bytes(drawn)
    (other,) = tmp_path.glob("stages/detect-unpruned-0-*")
    (other / DETECTIONS_FILE).write_bytes(b"no picture")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    report = tmp_path / "report"
    (picture,) = report.glob("detections-*")
    assert picture.name == "detections-01-vgg16-l1-ratio-0-5-1-prune_c.png"
    assert picture.read_bytes() == drawn
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "What the detector of Prune-C finds in test pictures, seed 1: vgg16, l1 ratio 0.5" in page
    assert page.count("<h3>Detection: voc") == 1
    results = (report / "results.json").read_text()
    assert str(tmp_path) not in results
    assert json.loads(results)["runs"][0]["transfer"]["unpruned"]["map"] == 72.0
    # Without the stages everything else is there again.
    assert main([str(report / "results.json"), "--out", str(tmp_path / "again")]) == 0
    tables = {path.name: path.read_text() for path in report.glob("*.csv")}
    assert {path.name: path.read_text() for path in (tmp_path / "again").glob("*.csv")} == tables
