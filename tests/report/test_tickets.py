"""Tickets and rewinding: what they are compared with, what they cost, and how they are drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rethink_prune.errors import UserError
from rethink_prune.report.__main__ import main
from rethink_prune.report.curves import board_groups
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.results import ResultRow, ResultTable, compute_report

WriteRun = Callable[..., Path]

NEW_ARMS = ("lottery", "lottery_b", "weight_rewind", "lr_rewind", "reshuffle")


def tables(place: Path, *, by: tuple[str, ...] = ()) -> tuple[ResultTable, ...]:
    return compute_report(group_runs(gather([place]).runs, by=by), margin=0.5).tables


def only_row(place: Path) -> ResultRow:
    ((row,),) = [table.rows for table in tables(place)]
    return row


def pairs(row: ResultRow) -> list[tuple[str, str]]:
    return [(comparison.first, comparison.second) for comparison in row.comparisons]


def test_tickets_are_compared_with_their_controls_too(write_run: WriteRun, tmp_path: Path) -> None:
    top1 = {"finetune": 93.0, "scratch_e": 92.0, "scratch_b": 92.5, **dict.fromkeys(NEW_ARMS, 91.0)}
    for seed in range(2):
        write_run(seed, top1, arms=list(top1))
    row = only_row(tmp_path / "runs")
    assert pairs(row)[:7] == [(arm, "finetune") for arm in ("scratch_e", "scratch_b", *NEW_ARMS)]
    assert pairs(row)[7:] == [
        *(("lottery", "scratch_e"), ("lottery_b", "scratch_b"), ("lottery", "reshuffle")),
        *(("weight_rewind", "scratch_e"), ("weight_rewind", "lottery")),
    ]
    # At their own lengths: Scratch-B's ticket is not compared with Scratch-E, though both have four epochs here.
    assert ("lottery_b", "scratch_e") not in pairs(row)


def test_a_ticket_is_paired_by_seed_and_corrected_with_all_others_and_said_in_words(
    write_run: WriteRun, tmp_path: Path
) -> None:
    ahead = [1.1, 1.4, 0.9, 1.2, 1.3, 1.0, 1.2, 1.1]
    for seed, points in enumerate(ahead):
        scratch = 92.0 + 0.3 * (seed % 3)
        write_run(seed, {"scratch_e": scratch, "lottery": scratch + points}, arms=["scratch_e", "lottery", "reshuffle"])
        write_run(seed, {"reshuffle": scratch + 0.1 * (-1) ** seed}, arms=["reshuffle"])
    row = only_row(tmp_path / "runs")
    assert pairs(row) == [("lottery", "scratch_e"), ("reshuffle", "scratch_e"), ("lottery", "reshuffle")]
    difference = row.comparisons[0].difference
    assert difference is not None
    assert (difference.n, difference.mean) == (8, pytest.approx(np.mean(ahead)))
    assert row.comparisons[0].p_holm == pytest.approx(3 * 2 / 256)
    assert row.comparisons[0].verdict == (
        "The lottery ticket is better than Scratch-E (paper recipe, paper budget, fp32) by 1.15 points [1.02, 1.28], "
        "n = 8."
    )
    assert row.comparisons[2].verdict.startswith("The lottery ticket is better than a random ticket (paper recipe")


def test_tickets_of_several_lengths_meet_arms_of_the_same_length_alone(write_run: WriteRun, tmp_path: Path) -> None:
    arms = {"finetune": 93.0, "lottery@2": 91.0, "lottery@0.5x": 92.0, "reshuffle@2": 90.0, "scratch@2": 90.5}
    arms |= {"scratch@8": 94.0, "retrain@2": 91.5, "scratch@4": 91.0}
    epochs = {"lottery@2": 2, "reshuffle@2": 2, "scratch@2": 2, "retrain@2": 2, "lottery@0.5x": 4, "scratch@8": 8}
    for seed in range(2):
        write_run(seed, arms, arms=list(arms), epochs=epochs)
    row = only_row(tmp_path / "runs")
    assert pairs(row) == [
        ("scratch@8", "finetune"),
        *(("lottery@0.5x", "scratch@4"), ("lottery@2", "scratch@2"), ("lottery@2", "reshuffle@2")),
    ]
    # Retraining still meets training from scratch.
    (curve,) = row.curves
    assert [(p.comparison.first, p.comparison.second) for p in curve.points] == [("retrain@2", "scratch@2")]
    assert row.arm("lottery@2") is not None


def test_a_ticket_and_its_name_with_a_length_are_one_training(write_run: WriteRun, tmp_path: Path) -> None:
    top1 = {"scratch_e": 92.0, "lottery": 93.0, "lottery_b": 93.5, "scratch_b": 93.0}
    same = {"lottery@e": "lottery", "lottery@b": "lottery_b"}
    for seed in range(2):
        write_run(seed, top1, arms=[*top1, *same], same=same)
    row = only_row(tmp_path / "runs")
    assert {result.arm for result in row.arms} == {*top1, "pruned"}
    assert ("lottery_b", "scratch_b") in pairs(row)
    assert len(pairs(row)) == len(set(pairs(row)))


def test_without_tickets_nothing_else_is_compared_or_shown(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert not {name for name in names if name.startswith(("remaining", "rounds"))}
    for name in ("report.md", "report.html"):
        text = (written / name).read_text().lower()
        assert not [word for word in ("ticket", "rewound", "in rounds", "t_n") if word in text]


def test_a_tickets_notation_and_its_share_of_the_large_network(write_run: WriteRun, tmp_path: Path) -> None:
    top1 = {
        "large": 94.0,
        "finetune": 93.0,
        "lottery": 92.0,
        "weight_rewind": 92.5,
        "lr_rewind": 92.5,
        "reshuffle": 91.0,
    }
    for ratio in (0.3, 0.5):
        run = write_run(0, top1, arms=list(top1)[1:], target={"ratio": ratio}, large_stage="large-0")
        summary = json.loads((run / "summary.json").read_text())
        if ratio == 0.5:
            # Its layers are known after pruning alone; where they are known before, nothing is its ancestor.
            summary["arms"]["reshuffle"]["train_flops_total"] += 2e15
        (run / "summary.json").write_text(json.dumps(summary))
    (table,) = tables(tmp_path / "runs")
    known, found = ({result.arm: result for result in row.arms} for row in table.rows)
    assert {arm: result.notation for arm, result in found.items() if result.notation} == {
        **{"finetune": "P_4-R_4", "lottery": "T_4", "weight_rewind": "T_4", "lr_rewind": "P_4-R_4", "reshuffle": "T_4"}
    }
    for arm in ("finetune", "lottery", "weight_rewind", "lr_rewind", "reshuffle"):
        assert found[arm].train_flops_amortised == pytest.approx(1e15 + 2e15 / 2)
    assert known["reshuffle"].train_flops_amortised == known["reshuffle"].flops_total == 1e15
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert (
        "T_N: a ticket, rewound or random ones too, trained for N epochs."
        in (tmp_path / "report/report.md").read_text()
    )


def test_a_ticket_of_a_pruner_that_needs_no_training_has_no_ancestors(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5):
        run = write_run(0, {"large": 94.0, "lottery": 92.0}, target={"ratio": ratio}, large_stage="large-0")
        summary = json.loads((run / "summary.json").read_text())
        summary["arms"]["lottery"]["train_flops_total"] = 1e15
        (run / "summary.json").write_text(json.dumps(summary))
    (table,) = tables(tmp_path / "runs")
    lottery, large = (table.rows[0].arm(arm) for arm in ("lottery", "large"))
    assert lottery is not None
    assert large is not None
    assert lottery.train_flops_amortised == 1e15
    # No row builds on the unpruned network, so its cost is not divided.
    assert large.train_flops_amortised == 2e15


def test_what_weights_are_rewound_to_is_shared_where_the_large_network_is_no_ancestor(
    write_run: WriteRun, tmp_path: Path
) -> None:
    early = {"status": "done", "epochs": 1, "top1": 50.0, "train_flops": 4e14, "stage": "/store/early-0"}
    for pruner in ("l1", "snip"):
        for ratio in (0.3, 0.5):
            top1 = {"large": 94.0, "weight_rewind": 92.5}
            run = write_run(0, top1, target={"ratio": ratio}, large_stage="large-0", pruner=pruner)
            summary = json.loads((run / "summary.json").read_text())
            summary["early"] = early
            if pruner == "snip":
                summary["arms"]["weight_rewind"]["train_flops_total"] = 1e15 + 4e14
            (run / "summary.json").write_text(json.dumps(summary))
    (table,) = tables(tmp_path / "runs")
    amortised = {row.pruner: {arm.arm: arm.train_flops_amortised for arm in row.arms} for row in table.rows}
    assert amortised["l1"]["weight_rewind"] == pytest.approx(1e15 + 2e15 / 2)
    assert amortised["snip"]["weight_rewind"] == pytest.approx(1e15 + 4e14 / 2)
    # It is no network to compare.
    assert "early" not in amortised["l1"]
    (first,) = group_runs(gather([tmp_path / "runs"]).runs)[0].runs
    assert first.early is not None
    assert first.early.stage == "early-0"


def write_rate(write: WriteRun, lr: float, seed: int, **options: Any) -> None:
    gain = 1.0 if lr < 0.1 else 0.0
    top1 = {"large": 94 - gain, "scratch_e": 92.0 - gain, "lottery": 92.0 + 0.01 * seed}
    write(seed, top1, arms=["scratch_e", "lottery"], settings={"recipe": {"lr": lr}}, **options)


def test_both_learning_rates_have_rows_verdicts_and_curves_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        for seed in range(6):
            for params, ratio in ((100, 0.5), (50, 0.75)):
                write_rate(write_run, lr, seed, target={"ratio": ratio}, params=params)
    with pytest.raises(UserError, match=r"they differ in recipe\.lr .*--by recipe\.lr"):
        tables(tmp_path / "runs")
    place, out = str(tmp_path / "runs"), tmp_path / "report"
    assert main([place, "--by", "recipe.lr", "--out", str(out)]) == 0
    with (out / "accuracy-1.csv").open() as opened:
        rows = {row["pruned by"]: row for row in csv.DictReader(opened)}
    assert set(rows) == {f"l1 ratio {ratio}, recipe.lr {lr}" for ratio in (0.5, 0.75) for lr in (0.1, 0.01)}
    assert (rows["l1 ratio 0.5, recipe.lr 0.1"]["unpruned"], rows["l1 ratio 0.5, recipe.lr 0.01"]["unpruned"]) == (
        *("94.0", "93.0"),
    )
    with (out / "differences-1.csv").open() as opened:
        found = {row["pruned by"]: float(row["difference"]) for row in csv.DictReader(opened)}
    assert found["l1 ratio 0.5, recipe.lr 0.1"] == pytest.approx(0.025)
    assert found["l1 ratio 0.5, recipe.lr 0.01"] == pytest.approx(1.025)
    text = (out / "report.md").read_text()
    assert "- vgg16, l1 ratio 0.5, recipe.lr 0.01: " in text
    (table,) = tables(tmp_path / "runs", by=("recipe.lr",))
    assert {sweep.title: sweep.unpruned.mean for sweep in table.sweeps if sweep.unpruned} == {
        **{"vgg16, l1, recipe.lr 0.1": 94.0, "vgg16, l1, recipe.lr 0.01": 93.0}
    }
    assert len(list(out.glob("remaining-*.svg"))) == 2


def test_every_new_arm_is_drawn_in_the_report_and_on_the_board(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(seed, {"large": 94.0, **dict.fromkeys(NEW_ARMS, 92.0)}, arms=list(NEW_ARMS))
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    (curves,) = (tmp_path / "report").glob("curves-*.svg")
    for color in ("#117733", "#88ccee", "#aa4499", "#cc6677", "#999933"):
        assert f"stroke: {color}" in curves.read_text()
    (group,) = board_groups(gather([tmp_path / "runs"]).runs)
    assert set(NEW_ARMS) <= {arm for arm, its in group.curves.items() if its}
