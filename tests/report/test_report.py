"""The command: what it writes, from what, and how it says that something is wrong."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.errors import UserError
from rethink_prune.report.__main__ import main
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.plots import _curves_figure, _ledger_figure
from rethink_prune.report.results import compute_report

WriteRun = Callable[..., Path]
Run = Callable[..., dict[str, Any]]

HOSTILE = "<script>alert('$x^{2$')</script>|*_&%\\#~--> \u00e9\U0001f600"


def test_markdown_has_the_table_of_the_paper_with_the_best_arm_in_bold(written: Path) -> None:
    text = (written / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert rows[0][:6] == ["network", "pruned by", "unpruned", "fine-tuned", "Scratch-E", "Scratch-B"]
    next_table = [row[0] for row in rows].index("network", 1)
    by_target = {row[1]: row for row in rows[:next_table] if row[0] == "vgg16"}
    assert by_target["l1 ratio 0.3"][2:] == [
        *("93.90 ± 0.10 (3)", "93.30 ± 0.00 (3)", "92.60 ± 0.10 (3)", "**94.00 ± 0.00 (3)**", "20.00 ± 0.00 (3)"),
        *("40.0 ± 0.0 (3)", "25.0 ± 0.0 (3)"),
    ]
    pair = "Scratch-B is ahead of fine-tuning (paper recipe, paper budget, fp32)"
    assert f"- vgg16, l1 ratio 0.3: {pair} by 0.70 points" in text
    assert "significant" not in text
    assert "- vgg16, l1 variant A: seed 0: fine-tuning is not finished." in text
    pictures = re.findall(r"\]\((.*\.png)\)", text)
    assert pictures
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_paper_is_compared_by_the_best_epoch_and_that_is_said(written: Path) -> None:
    text = (written / "report.md").read_text()
    _, part = text.split("## Beside the paper")
    assert "best epoch on the test images, which is what the paper reports" in part
    rows = list(csv.DictReader((written / "paper-1.csv").open()))
    assert [row["arm"] for row in rows] == ["unpruned", "Scratch-B"]
    scratch_b = rows[1]
    assert (float(scratch_b["best epoch on test"]), float(scratch_b["paper"])) == (94.0, 93.78)
    assert float(scratch_b["difference"]) == pytest.approx(0.22)
    assert (scratch_b["paper sd"], scratch_b["paper n"]) == ("0.15", "5")


def test_csv_has_all_digits_in_columns_of_their_own(written: Path) -> None:
    rows = list(csv.DictReader((written / "accuracy-1.csv").open()))
    assert [row["pruned by"] for row in rows] == ["l1 ratio 0.3", "l1 ratio 0.5", "l1 variant A"]
    assert float(rows[0]["unpruned"]) == pytest.approx(93.9)
    assert float(rows[0]["unpruned sd"]) == pytest.approx(0.1)
    assert (rows[0]["unpruned n"], rows[2]["fine-tuned"]) == ("3", "")
    difference = next(csv.DictReader((written / "differences-1.csv").open()))
    assert (difference["arm"], difference["against"], difference["p"]) == ("Scratch-E", "fine-tuned", "0.25")
    middle = (float(difference["95 % interval low"]) + float(difference["95 % interval high"])) / 2
    assert middle == pytest.approx(float(difference["difference"])) == pytest.approx(-0.7)


def test_json_holds_what_the_tables_show_and_no_paths_and_makes_the_same_report_again(
    written: Path, tmp_path: Path
) -> None:
    text = (written / "results.json").read_text()
    assert str(written.parent) not in text
    results = json.loads(text)
    assert (results["format"], results["version"], results["margin"], len(results["runs"])) == (
        *("rethink-prune results", 1, 0.5),
        7,
    )
    row = results["tables"][0]["rows"][0]
    assert [arm["arm"] for arm in row["arms"]] == ["large", "finetune", "scratch_e", "scratch_b", "pruned"]
    assert row["comparisons"][1]["difference"]["p_floor"] == 0.25
    assert main([str(written / "results.json"), "--out", str(tmp_path / "again")]) == 0
    again, before = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for folder in (tmp_path / "again", written)
    )
    assert again == before


def test_every_kind_of_picture_is_drawn_and_is_sound(written: Path) -> None:
    names = {path.stem for path in written.glob("*.svg")}
    assert {name.split("-")[0] for name in names} == {"curves", "targets", "differences", "widths", "ledger"}
    assert names == {path.stem for path in written.glob("*.png")}
    for path in written.glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert not re.search(
            r"<dc:date>|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib)", path.read_text()
        )


def test_markdown_takes_hostile_names_for_text(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"large": 94.0, "finetune": 93.0}, model="a|b`*c* [d](javascript:e) <b>\\|")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| a\\|b\\`\\*c\\* [d]\\(javascript:e) &lt;b&gt;\\\\\\| |" in text
    assert "<b>" not in text


def test_latex_has_a_booktabs_table_for_each_grid(written: Path) -> None:
    text = (written / "tables.tex").read_text()
    for part in ("\\begin{table}", "\\toprule", "\\midrule", "\\bottomrule", "\\end{table}"):
        assert text.count(part) == len(list(written.glob("*.csv")))
    assert "\\textbf{94.00 $\\pm$ 0.00 (3)}" in text


def test_latex_compiles_even_with_hostile_names(write_run: WriteRun, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    write_run(0, {"large": 94.0, "finetune": 93.0, "scratch_b": 94.0}, model=HOSTILE)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{tables}\\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:]


def test_a_report_over_real_studies_and_over_their_store(
    small_study: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = small_study("arms=[scratch_e]")
    with pytest.raises(UserError):
        small_study("arms=[finetune,scratch_e]", "seed=1", "recipe.finetune.lr=1e30")
    capsys.readouterr()
    places = [str(tmp_path / name) for name in ("run1", "run2", "store")]
    assert main([*places, "--by", "recipe.finetune.lr", "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert f" {summary['arms']['scratch_e']['top1']:.2f} (1) |" in printed
    assert "seed 1: fine-tuning failed: the training loss became" in printed
    assert "hold the same run" not in printed
    assert f"The page: {tmp_path / 'report/report.html'}" in printed


def test_what_is_wrong_is_said_in_words(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "nowhere: no such folder" in refused(str(tmp_path / "nowhere"))
    assert "holds no summary.json" in refused(str(tmp_path))
    write_run(0, {"finetune": 93.0})
    write_run(1, {"finetune": 93.0}, precision="bf16")
    assert "they differ in precision (fp32 in runs/run0, bf16 in runs/run1)" in refused(str(tmp_path / "runs"))
    assert main([str(tmp_path / "runs/run0"), "--out", str(tmp_path / "runs/run0")]) == 1
    assert "run0: is a run's folder; name another one" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "runs/run0"), "--out", str(tmp_path / "file/report")]) == 1
    assert "cannot be made (Not a directory); name a folder you can write" in capsys.readouterr().err
    for margin in ("0", "-1", "nan", "half"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "runs"), "--margin", margin])


def test_numbers_that_are_not_finite_are_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 93.0})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "one")]) == 0
    results = json.loads((tmp_path / "one/results.json").read_text())
    (run,) = results["runs"]
    run["arms"]["finetune"]["curve"] = [float("nan"), 93.0]
    run["study"]["target"] = {"ratio": float("inf")}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main([str(tmp_path / "results.json"), "--out", str(tmp_path / "two")]) == 0
    (again,) = json.loads((tmp_path / "two/results.json").read_text())["runs"]
    assert "curve" not in again["arms"]["finetune"]
    assert again["arms"]["finetune"]["top1"] == 93.0


def test_what_is_left_out_is_in_the_report(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 93.0})
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/summary.json").write_text('{"study": ')
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    for name in ("report.md", "report.html", "results.json"):
        assert "broken/summary.json: left out: is damaged" in (tmp_path / "report" / name).read_text()


def test_of_many_runs_a_report_draws_few_pictures_and_says_so(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(written.parent / "runs")
    monkeypatch.setattr("rethink_prune.report.gather.DETAILED_RUNS", 6)
    monkeypatch.setattr("rethink_prune.report.plots._MOST_DIFFERENCES", 3)
    assert main([runs, "--out", str(tmp_path / "few")]) == 0
    said = "these are 7 runs, more than 6: curves, masks and pictures of single rows are left out"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "few/report.html").read_text()
    names = {path.name for path in (tmp_path / "few").glob("*.svg")}
    assert names == {"differences-01.svg", "targets-01.svg"}
    assert "the first 3 of 4; the table has all" in (tmp_path / "few/differences-01.svg").read_text()
    assert main([runs, "--out", str(tmp_path / "all"), "--details"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "all").glob("*.svg")} == {path.name for path in written.glob("*.svg")}
    for table in written.glob("*.csv"):
        assert (tmp_path / "few" / table.name).read_text() == table.read_text()


def test_help_needs_no_library(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rethink_prune.report", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "--margin POINTS" in done.stdout
    assert not imported & {"torch", "numpy", "scipy", "matplotlib", "pydantic", "jinja2"}


def test_what_finding_the_widths_took_stands_in_verdicts_tables_and_pictures(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        run = write_run(seed, {"large": 94.0, "finetune": 93.0, "scratch_e": 92.0 + seed}, pruner="slimming")
        summary = json.loads((run / "summary.json").read_text())
        summary["arms"]["finetune"]["train_flops_with_search"] = 3e15
        summary["arms"]["scratch_e"]["train_flops_with_search"] = 4.5e15
        (run / "summary.json").write_text(json.dumps(summary))
    groups = group_runs(gather([tmp_path / "runs"]).runs)
    (row,) = compute_report(groups, margin=0.5).tables[0].rows
    said = "FLOPs with the trainings that found the network's widths: Scratch-E 4.5e+15, fine-tuning 3e+15."
    assert row.comparisons[0].verdict.endswith(said)
    by_epoch, by_flops = _curves_figure([arm for arm in row.arms if arm.curve]).axes
    (marker,) = [line for line in by_flops.lines if line.get_marker() == ">"]
    assert [float(x) for x in marker.get_xdata()] == [1e15, 4.5e15], "Scratch-E's own training, and with the search"
    assert by_flops.get_legend() is not None
    assert not [line for line in by_epoch.lines if line.get_marker() == ">"]
    bars = _ledger_figure([arm for arm in row.arms if arm.train_flops]).axes[0].patches
    assert [bar.get_width() for bar in bars[-3:]] == [0, 0, 3.5e15], "the last kind of bars is the search"


def test_the_precision_stands_in_tables_and_verdicts(write_run: WriteRun, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        for seed in range(2):
            arms = {"finetune": 93.0, "scratch_e": 92.0 + seed / 3}
            write_run(seed, arms, precision=precision, experiment="l1_vgg16_cifar10", target={"variant": "A"})
    runs = gather([tmp_path / "runs"]).runs
    with pytest.raises(UserError, match=r"precision \("):
        group_runs(runs)
    (table,) = compute_report(group_runs(runs, by=["precision"]), margin=0.5).tables
    assert table.title == "cifar10, paper recipe, paper budget, bf16 or fp32"
    for row in table.rows:
        precision = row.pruned_by.rsplit(" ", 1)[1]
        assert f"(paper recipe, paper budget, {precision})" in row.comparisons[0].verdict
        unlike = "trained in bf16; the paper's are trained in fp32"
        assert (unlike in row.notes) == (precision == "bf16")


def test_a_new_report_leaves_nothing_of_the_one_before(write_run: WriteRun, tmp_path: Path) -> None:
    folder = tmp_path / "report"

    def report(ratio: float) -> set[str]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        write_run(0, {"large": 94.0, "finetune": 93.0}, target={"ratio": ratio})
        assert main([str(tmp_path / "runs"), "--out", str(folder)]) == 0
        return {path.name for path in folder.iterdir()}

    first = report(0.3)
    (folder / "my notes.txt").write_text("mine")
    assert "curves-01-vgg16-l1-ratio-0-3.png" in first
    assert report(0.5) == {name.replace("ratio-0-3", "ratio-0-5") for name in first} | {"my notes.txt"}
