"""Arms over lengths of training: which are paired, what is said of their gap, and where it stands in a report."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rethink_prune.report.__main__ import main
from rethink_prune.report.budget_axis import BudgetCurve
from rethink_prune.report.curves import board_groups
from rethink_prune.report.gap_plot import gap_figure
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.results import ResultRow, ResultTable, compute_report
from rethink_prune.tracking.board import BoardFolder

WriteRun = Callable[..., Path]

LENGTHS = (1, 2, 4, 8)
# Points by which retraining is ahead: at equal training it crosses zero at 4 * 2**0.75, about 6.7 epochs.
GAPS = {1: 9.0, 2: 4.0, 4: 1.5, 8: -0.5}
CONDITIONS = "(paper recipe, paper budget, fp32)"


def write_lengths(
    write: WriteRun, seed: int, gaps: Mapping[int, float], *, totals: Mapping[int, float] | None = None, **options: Any
) -> Path:
    """Write a run that has retraining of each length, and its counterparts by how far retraining is ahead of them."""
    top1 = {"large": 95.0, "finetune": 93.0}
    epochs = {"large": 8}
    for length, gap in gaps.items():
        top1 |= {f"retrain@{length}": 92.0, f"scratch@{length}": 92.0 - gap}
        epochs |= {f"retrain@{length}": length, f"scratch@{length}": length}
    for length, gap in (totals or {}).items():
        top1[f"scratch@total:{length}"] = 92.0 - gap
        epochs[f"scratch@total:{length}"] = length + 16
    top1 |= options.pop("top1", {})
    epochs |= options.pop("epochs", {})
    arms = [arm for arm in top1 if arm != "large"] + list(options.get("same", {}))
    return write(seed, top1, epochs=epochs, arms=arms, large_stage=f"large-{seed}", **options)


def uneven(seed: int) -> dict[int, float]:
    """Return gaps that differ from seed to seed by up to 0.3 points."""
    return {length: round(gap + 0.1 * ((seed * length) % 7 - 3), 2) for length, gap in GAPS.items()}


def tables(place: Path) -> tuple[ResultTable, ...]:
    return compute_report(group_runs(gather([place]).runs), margin=0.5).tables


def only_row(place: Path) -> ResultRow:
    ((row,),) = [table.rows for table in tables(place)]
    return row


def gaps_of(curve: BudgetCurve) -> dict[float, tuple[float, int]]:
    """Return the mean gap and the number of seeds by length."""
    differences = {point.epochs: point.comparison.difference for point in curve.points}
    return {epochs: (round(d.mean, 6), d.n) for epochs, d in differences.items() if d is not None}


def test_arms_are_paired_by_their_epochs_and_total_ones_by_what_was_typed(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_lengths(
            write_run,
            seed,
            {1: 9.0 + seed},
            totals={1: -1.0 - seed},
            # 0.25x of 8 epochs is 2; Scratch-E has 8.
            top1={"retrain@0.25x": 92.0, "scratch@2": 88.0, "retrain@e": 93.0, "scratch_e": 93.5},
            epochs={"retrain@0.25x": 2, "scratch@2": 2, "retrain@e": 8, "scratch_e": 8},
        )
    training, total = only_row(tmp_path / "runs").curves
    assert (training.question, total.question) == ("training", "total")
    assert gaps_of(training) == {1: (9.5, 2), 2: (4.0, 2), 8: (-0.5, 2)}
    assert gaps_of(total) == {1: (-1.5, 2)}
    assert [(p.epochs, p.scratch_epochs) for p in total.points] == [(1, 17)]
    assert [p.comparison.second for p in training.points] == ["scratch@1", "scratch@2", "scratch_e"]


def test_arms_with_a_teacher_have_curves_and_a_panel_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        taught = {"retrain_kd@1": 94.0, "scratch_kd@1": 92.0, "retrain_kd@2": 94.0, "scratch_kd@2": 94.5}
        epochs = {"retrain_kd@1": 1, "scratch_kd@1": 1, "retrain_kd@2": 2, "scratch_kd@2": 2}
        write_lengths(write_run, seed, GAPS, top1=taught, epochs=epochs)
    row = only_row(tmp_path / "runs")
    plain, taught_curve = row.curves
    assert (plain.kind, taught_curve.kind) == ("", "_kd")
    assert gaps_of(taught_curve) == {1: (2.0, 2), 2: (-0.5, 2)}
    assert taught_curve.verdict.startswith("At equal training, with a teacher (paper recipe")
    assert len(gap_figure(row.curves, margin=0.5).axes) == 4


def test_pairs_are_the_seeds_that_finished_both(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_lengths(write_run, seed, GAPS, top1={"scratch@4": "nan"} if seed == 1 else {})
    (curve,) = only_row(tmp_path / "runs").curves
    assert {epochs: n for epochs, (_, n) in gaps_of(curve).items()} == {1: 3, 2: 3, 4: 2, 8: 3}
    assert curve.points[2].comparison.seeds == (0, 2)


def test_compared_over_lengths_an_arm_is_not_compared_with_fine_tuning(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        run = write_lengths(write_run, seed, GAPS, top1={"scratch_b": 94.0, "scratch@total:finetune": 94.1})
        summary = json.loads((run / "summary.json").read_text())
        # Still to be trained: it will have its place among the lengths.
        summary["study"]["arms"] += ["retrain@16", "scratch@16"]
        (run / "summary.json").write_text(json.dumps(summary))
    (table,) = tables(tmp_path / "runs")
    compared = [(c.first, c.second) for c in table.rows[0].comparisons]
    assert compared == [("scratch_b", "finetune"), ("scratch@total:finetune", "finetune")]
    assert table.arms == ("large", "finetune", "scratch_b", "scratch@total:finetune", "pruned")
    assert table.rows[0].best == ("scratch@total:finetune",)


def test_without_a_common_length_arms_are_compared_as_all_others(write_run: WriteRun, tmp_path: Path) -> None:
    top1 = {"finetune": 93.0, "retrain@4": 92.0, "scratch@8": 91.0}
    write_run(0, top1, epochs={"scratch@8": 8}, arms=list(top1))
    row = only_row(tmp_path / "runs")
    assert row.curves == ()
    assert {c.first for c in row.comparisons} == {"retrain@4", "scratch@8"}


def test_two_names_of_one_training_count_once(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        same = {"scratch@8": "scratch_e", "retrain@0.5x": "retrain@4"} if seed == 0 else {}
        top1 = {"finetune": 93.0, "retrain@4": 92.0, "scratch@4": 91.0, "scratch_e": 94.0}
        arms = [*top1, "scratch@8", "retrain@0.5x"]
        # The second run asked for one name alone.
        if seed == 1:
            arms = ["finetune", "retrain@4", "scratch@4", "scratch@8"]
            top1 = {"scratch@8" if arm == "scratch_e" else arm: value for arm, value in top1.items()}
        write_run(seed, top1, epochs={"scratch_e": 8, "scratch@8": 8}, arms=arms, same=same)
    row = only_row(tmp_path / "runs")
    assert {result.arm: result.top1.n for result in row.arms if result.top1} == {
        **{"finetune": 2, "scratch_e": 2, "retrain@4": 2, "scratch@4": 2, "pruned": 2}
    }
    assert [len(curve.points) for curve in row.curves] == [1]
    assert "scratch@8 and scratch_e are one training: it counts once, as Scratch-E" in row.notes
    assert not [note for note in row.notes if "not finished" in note]


def test_what_has_the_computation_of_fine_tuning_is_compared_with_it(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_lengths(write_run, seed, {1: 9.0}, totals={1: -1.0}, same={"scratch@total:finetune": "scratch@total:1"})
    row = only_row(tmp_path / "runs")
    assert [(c.first, c.second) for c in row.comparisons] == [("scratch@total:finetune", "finetune")]
    assert [curve.question for curve in row.curves] == ["training", "total"]


def test_names_that_are_one_training_in_some_seeds_alone_stay_two_arms(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 93.0, "scratch_b": 94.0}, same={"scratch@23": "scratch_b"})
    write_run(1, {"finetune": 93.0, "scratch_b": 94.0, "scratch@23": 93.5})
    assert {"scratch_b", "scratch@23"} <= {result.arm for result in only_row(tmp_path / "runs").arms}


def said(write: WriteRun, place: Path, gaps: Callable[[int], Mapping[int, float]], seeds: int, **options: Any) -> str:
    for seed in range(seeds):
        write_lengths(write, seed, gaps(seed), **options)
    return only_row(place).curves[0].verdict


def test_the_verdict_says_when_training_from_scratch_catches_up(write_run: WriteRun, tmp_path: Path) -> None:
    assert said(write_run, tmp_path / "runs", uneven, 8) == (
        f"At equal training {CONDITIONS}, training from scratch catches up after about 6.6 epochs of training (95 % "
        "interval 6.3 to 7.1, 8 seeds). Shown after correction for 4 lengths: retraining is better at 1, 2 and 4 "
        "epochs; from scratch is better at 8 epochs."
    )


def test_the_verdict_says_when_it_does_not_catch_up(write_run: WriteRun, tmp_path: Path) -> None:
    verdict = said(write_run, tmp_path / "runs", lambda seed: {n: gap + 3 for n, gap in uneven(seed).items()}, 3)
    assert verdict == (
        f"At equal training {CONDITIONS}, training from scratch does not catch up within 1 to 8 epochs of training "
        "(95 % interval beyond 8, 3 seeds). At no single length is a difference or equivalence shown after correction "
        "for 4 lengths; 3 seeds cannot show a difference: the smallest p they allow is 0.25, 1 after correction."
    )


def test_the_verdict_says_when_there_is_no_head_start(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(8):
        write_lengths(write_run, seed, uneven(seed), totals={n: -1 - 0.01 * (seed % 3) for n in LENGTHS})
    (_, total) = only_row(tmp_path / "runs").curves
    assert total.verdict == (
        f"At equal total computation {CONDITIONS}, retraining has no head start: training from scratch is level or "
        "ahead within 1 to 8 epochs of retraining (95 % interval below 1, 8 seeds). Shown after correction for 4 "
        "lengths: from scratch is better at 1, 2, 4 and 8 epochs."
    )


def test_the_verdict_says_what_cannot_be_told(write_run: WriteRun, tmp_path: Path) -> None:
    verdict = said(write_run, tmp_path / "runs", lambda seed: dict.fromkeys(LENGTHS, 0.1 - seed), 3)
    assert "it cannot be told where training from scratch catches up: within 1 to 8 epochs of training" in verdict
    assert "(95 % interval below 1 to beyond 8, 3 seeds)" in verdict


@pytest.mark.parametrize(("sign", "expected"), [
    (1, "training from scratch does not catch up within 1 to 8 epochs of training"),
    (-1, "retraining has no head start: training from scratch is level or ahead within 1 to 8 epochs of training"),
])  # fmt: skip
def test_a_gap_that_is_clear_at_the_outermost_length_is_told_though_another_one_is_not(
    sign: int, expected: str, write_run: WriteRun, tmp_path: Path
) -> None:
    def gaps(seed: int) -> dict[int, float]:
        clear, unclear = sign * (2 + 0.1 * seed), sign * (seed - 0.9)
        # The end that the crossover lies beyond is clear, the other one is not.
        return {1: unclear, 2: clear, 4: clear, 8: clear} if sign > 0 else {1: clear, 2: clear, 4: clear, 8: unclear}

    verdict = said(write_run, tmp_path / "runs", gaps, 3)
    assert f"{expected} (95 % interval below 1 to beyond 8, 3 seeds)" in verdict


def test_one_seed_has_a_crossover_and_no_interval(write_run: WriteRun, tmp_path: Path) -> None:
    assert said(write_run, tmp_path / "runs", lambda _: GAPS, 1) == (
        f"At equal training {CONDITIONS}, training from scratch catches up after about 6.7 epochs of training (one "
        "seed: no interval). One seed: no test."
    )


def test_one_length_has_no_crossover(write_run: WriteRun, tmp_path: Path) -> None:
    verdict = said(write_run, tmp_path / "runs", lambda seed: {4: 1.5 + 0.1 * seed}, 8)
    assert verdict.startswith(f"At equal training {CONDITIONS}, for the only length of retraining, 4 epochs: ")
    assert " by 1.85 points [" in verdict


def test_p_values_are_corrected_for_the_lengths_of_a_curve_alone(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5):
        for seed in range(8):
            write_lengths(write_run, seed, uneven(seed), target={"ratio": ratio}, top1={"scratch_b": 94 + seed / 9})
    (table,) = tables(tmp_path / "runs")
    for row in table.rows:
        (curve,) = row.curves
        assert [p.comparison.p_holm_floor for p in curve.points] == pytest.approx([4 * 2 / 256] * 4)
        # The family of fine-tuning and Scratch-B does not grow by the lengths.
        assert [c.p_holm_floor for c in row.comparisons] == pytest.approx([2 * 2 / 256])


@pytest.fixture(scope="module")
def over_lengths(tmp_path_factory: pytest.TempPathFactory, writer_below: Callable[[Path], WriteRun]) -> Path:
    """Return the folder of a report over two ratios that share their large networks; not to be changed."""
    root = tmp_path_factory.mktemp("over_lengths")
    write_run = writer_below(root)
    for ratio in (0.3, 0.5):
        for seed in range(3):
            totals = {n: -0.4 + 0.1 * ((seed + n) % 3) for n in LENGTHS}
            write_lengths(write_run, seed, uneven(seed), totals=totals, target={"ratio": ratio})
    assert main([str(root / "runs"), "--out", str(root / "report")]) == 0
    return root / "report"


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_tables_hold_gaps_and_crossovers(over_lengths: Path) -> None:
    rows = rows_of(over_lengths / "lengths-1.csv")
    assert [(row["equal"], row["N"], row["N from scratch"]) for row in rows[:8]] == [
        *(("equal training", f"{n}.0", f"{n}.0") for n in LENGTHS),
        *(("equal total computation", f"{n}.0", f"{n + 16}.0") for n in LENGTHS),
    ]
    assert float(rows[0]["gap"]) == pytest.approx(np.mean([uneven(seed)[1] for seed in range(3)]))
    crossovers = rows_of(over_lengths / "crossover-1.csv")
    assert len(crossovers) == 4
    training, total = crossovers[:2]
    assert (training["lengths"], training["n"]) == ("1 to 8", "3")
    assert float(training["95 % from"]) < float(training["crossover N"]) < float(training["95 % to"])
    assert total["crossover N"] == "below 1"
    text = (over_lengths / "report.md").read_text()
    assert "The intervals are pointwise: each holds at 95 % for its own N" in text
    assert (over_lengths / "tables.tex").read_text().count("Crossover: cifar10") == 1
    assert "training from scratch catches up after about" in (over_lengths / "report.html").read_text()


def test_json_holds_points_and_crossovers_as_plain_values_and_makes_the_same_report_again(
    over_lengths: Path, tmp_path: Path
) -> None:
    row = json.loads((over_lengths / "results.json").read_text())["tables"][0]["rows"][0]
    training, total = row["curves"]
    assert (training["question"], total["question"]) == ("training", "total")
    crossover = training["crossover"]
    assert (crossover["shortest"], crossover["longest"], len(crossover["by_seed"])) == (1, 8, 3)
    assert crossover["interval"][0] < crossover["place"] < crossover["interval"][1]
    assert total["crossover"]["place"] == "below"
    assert [point["epochs"] for point in training["points"]] == list(LENGTHS)
    assert training["points"][0]["comparison"]["first"] == "retrain@1"
    assert main([str(over_lengths / "results.json"), "--out", str(tmp_path / "again")]) == 0
    before, again = ((folder / "report.md").read_text() for folder in (over_lengths, tmp_path / "again"))
    assert again == before


def test_names_of_files_hold_no_colon(over_lengths: Path) -> None:
    assert (over_lengths / "gap-01-vgg16-l1-ratio-0-3.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in over_lengths.iterdir() if ":" in path.name]


def test_latex_with_lengths_compiles(over_lengths: Path, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{tables}\\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    shutil.copy(over_lengths / "tables.tex", tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:]


def test_the_large_networks_cost_is_divided_by_the_rows_that_build_on_it(over_lengths: Path) -> None:
    rows = {row["arm"]: row for row in rows_of(over_lengths / "cost-1.csv") if row["pruned by"] == "l1 ratio 0.3"}
    large = 8 * 5e14
    retrained, scratch = (next(row for row in rows.values() if row["notation"] == n) for n in ("P_8-R_4", "S_4"))
    assert float(retrained["with ancestors"]) == pytest.approx(large + 4 * 2.5e14)
    assert float(retrained["amortised"]) == pytest.approx(large / 2 + 4 * 2.5e14)
    assert float(scratch["amortised"]) == float(scratch["with ancestors"]) == pytest.approx(4 * 2.5e14)
    assert float(rows["unpruned"]["amortised"]) == pytest.approx(large / 2)
    assert (rows["unpruned"]["notation"], rows["fine-tuned"]["notation"]) == ("", "P_8-R_4")


def test_what_the_pruner_trains_is_divided_and_a_teacher_too(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5, 0.7):
        arms = {"large": 95.0, "finetune": 93.0, "scratch_kd@4": 92.0}
        run = write_run(0, arms, target={"ratio": ratio}, large_stage="large-0", pruner="slimming")
        summary = json.loads((run / "summary.json").read_text())
        # The network that is pruned has sparse training for its parent; the teacher is the plainly trained one.
        summary["sparse"] = {**summary["large"], "train_flops": 6e15, "train_flops_total": 6e15, "stage": "sparse-0"}
        summary["arms"]["finetune"]["train_flops_total"] = 1e15 + 6e15
        summary["arms"]["scratch_kd@4"]["train_flops_total"] = 1e15 + 2e15
        (run / "summary.json").write_text(json.dumps(summary))
    (table,) = tables(tmp_path / "runs")
    amortised = {result.arm: result.train_flops_amortised for result in table.rows[0].arms}
    assert amortised["finetune"] == pytest.approx(1e15 + 6e15 / 3)
    assert amortised["scratch_kd@4"] == pytest.approx(1e15 + 2e15 / 3)


def test_the_picture_shows_both_questions_the_margin_and_the_crossover(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(8):
        write_lengths(write_run, seed, uneven(seed), totals={n: -1 - 0.01 * (seed % 3) for n in LENGTHS})
    curves = only_row(tmp_path / "runs").curves
    figure = gap_figure(curves, margin=0.5)
    gaps, crossovers = figure.axes
    assert gaps.get_xscale() == "log"
    assert [text.get_text() for text in crossovers.get_xticklabels()] == ["1", "2", "4", "8"]
    legend = gaps.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["equivalence margin, 0.5", "equal training", "equal total computation"]
    (diamond,) = [line for line in crossovers.lines if line.get_marker() == "d"]
    assert float(diamond.get_xdata()[0]) == pytest.approx(4 * 2 ** (1.4625 / 2.0))
    assert len({line.get_color() for line in crossovers.lines}) == 2


def test_the_board_has_arms_of_several_lengths_each_training_once(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        top1 = {"retrain@4": 92.0, "scratch_e": 91.0, "scratch@total:4": 93.0}
        write_run(seed, top1, arms=list(top1), same={"scratch@8": "scratch_e"})
    board = BoardFolder(tmp_path / "board")
    board.write(board_groups(gather([tmp_path / "runs"]).runs))
    board.close()
    shown = {path.parent.relative_to(board.folder).as_posix() for path in board.folder.rglob("*tfevents*")}
    assert {name for name in shown if name.endswith("/mean")} == {
        *("retrain@4/mean", "scratch_e/mean", "scratch@total-4/mean")
    }
    read = EventAccumulator(str(board.folder / "scratch@total-4/mean")).Reload()
    assert [round(p.value, 3) for p in read.Scalars("vgg16 l1 0.5/accuracy top-1 by epoch")][-1] == 93.0
