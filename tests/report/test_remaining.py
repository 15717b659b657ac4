"""Accuracy over what remains, and the rounds of studies that prune in several."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.report.__main__ import main
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.plots import remaining_figure
from rethink_prune.report.remaining import Size, SizeSweep
from rethink_prune.report.results import ResultTable, compute_report

WriteRun = Callable[..., Path]

# After each round half of the parameters are left, of 200, and 60 % of the MACs, of 1,000.
PARAMS, MACS = (100, 50, 25), (600, 360, 216)


def only_table(place: Path) -> ResultTable:
    (table,) = compute_report(group_runs(gather([place]).runs), margin=0.5).tables
    return table


def only_sweep(place: Path) -> SizeSweep:
    (sweep,) = only_table(place).sweeps
    return sweep


def write_rounds(write: WriteRun, seed: int, rounds: int, top1: dict[str, float], **options: Any) -> Path:
    """Write a study in rounds of a half each; the training after round r ends at 94 - r, plus a tenth for each seed."""
    between = options.pop("between", "init")
    pruner = {"rounds": rounds, "share_per_round": 0.5, "between_rounds": between, **options.pop("pruner", {})}
    entries = [
        {
            **{"round": r, "params": PARAMS[r - 1], "channels": 30 - r, "macs": MACS[r - 1]},
            **{"top1_before": 95.0 - r, "top1": 50.0 - r, "top1_recalibrated": 60.0 - r, "stage": f"/store/prune-{r}"},
            "top1_trained": 94.0 - r + seed / 10 if r < rounds else None,
            "epochs": 4 if r < rounds else 0,
            "train_flops": 10**15 if r < rounds else 0,
            "trained_stage": f"/store/round-{r}-{seed}" if r < rounds else None,
        }
        for r in range(1, rounds + 1)
    ]
    return write(
        seed,
        {"large": 94.0 + seed, **top1},
        arms=list(top1),
        target={"share_per_round": 0.5},
        settings={"pruner": pruner},
        large_stage=f"large-{seed}",
        params=PARAMS[rounds - 1],
        macs=MACS[rounds - 1],
        rounds=entries,
        **options,
    )


def places(sweep: SizeSweep) -> list[tuple[bool, float, float]]:
    return [(s.in_rounds, s.params_kept.mean, s.macs_kept.mean) for s in sweep.sizes if s.params_kept and s.macs_kept]


def means(size: Size) -> dict[str, tuple[float, int]]:
    return {arm: (round(top1.mean, 6), top1.n) for arm, top1 in size.top1.items()}


def test_sizes_of_one_cut_and_of_rounds_are_told_apart_and_in_order(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        for params, macs, ratio in ((50, 360, 0.75), (100, 600, 0.5)):
            top1 = {"large": 94.0 + seed, "finetune": 93.0, "lottery": 91.0 + ratio, "scratch_e": 92.0}
            settings = {"pruner": {"rounds": None, "ratio": ratio, "between_rounds": "init"}}
            options: dict[str, Any] = {"target": {"ratio": ratio}, "settings": settings, "large_stage": f"large-{seed}"}
            write_run(seed, top1, arms=list(top1)[1:], params=params, macs=macs, **options)
        # Between rounds matters for rounds alone: these are of the same sweep.
        write_rounds(write_run, seed, 2, {"lottery": 92.5 + seed}, between="none")
    sweep = only_sweep(tmp_path / "runs")
    assert places(sweep) == [(False, 50, 60), (False, 25, 36), (True, 50, 60), (True, 25, 36)]
    assert [size.pruned_by for size in sweep.sizes] == [
        *("l1 ratio 0.5", "l1 ratio 0.75"),
        *("l1 share_per_round 0.5 in 2 rounds, after round 1", "l1 share_per_round 0.5 in 2 rounds"),
    ]
    assert means(sweep.sizes[0]) == {"finetune": (93, 2), "scratch_e": (92, 2), "lottery": (91.5, 2)}
    assert means(sweep.sizes[3]) == {"lottery": (93, 2)}
    assert sweep.unpruned is not None
    assert (sweep.unpruned.mean, sweep.unpruned.n) == (94.5, 2)


@pytest.mark.parametrize(("between", "arm"), [("init", "lottery"), ("epoch", "weight_rewind"), ("none", "finetune")])
def test_what_is_trained_between_rounds_is_the_arm_of_a_study_with_fewer(
    between: str, arm: str, write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        write_rounds(write_run, seed, 3, {arm: 80.0}, between=between)
    sweep = only_sweep(tmp_path / "runs")
    assert [means(size) for size in sweep.sizes] == [{arm: (93.05, 2)}, {arm: (92.05, 2)}, {arm: (80, 2)}]


def test_a_study_of_so_many_rounds_stands_for_them_and_a_shared_training_counts_once(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        write_rounds(write_run, seed, 2, {"lottery": 70.0})
        write_rounds(write_run, seed, 3, {"lottery": 60.0})
    sizes = only_sweep(tmp_path / "runs").sizes
    assert [(size.pruned_by.split(" in ")[1], means(size)["lottery"]) for size in sizes] == [
        ("2 rounds, after round 1", (93.05, 2)),
        ("2 rounds", (70, 2)),
        ("3 rounds", (60, 2)),
    ]


def test_a_training_between_rounds_of_another_length_is_not_the_arm(write_run: WriteRun, tmp_path: Path) -> None:
    write_rounds(write_run, 0, 2, {"lottery": 70.0}, epochs={"lottery": 9})
    write_rounds(write_run, 0, 3, {"scratch_e": 70.0})
    sizes = [(list(size.top1), place) for size, (_, place, _) in zip(*_with_places(tmp_path / "runs"), strict=True)]
    # The study of three rounds has no ticket to compare its lengths with.
    assert sizes == [(["lottery"], 50), (["lottery"], 25), (["scratch_e"], 12.5)]
    write_rounds(write_run, 1, 3, {"lottery": 60.0}, epochs={"lottery": 9}, model="resnet20")
    table = only_table(tmp_path / "runs")
    assert [sweep.sweep for sweep in table.sweeps] == ["vgg16, l1"]


def _with_places(place: Path) -> tuple[tuple[Size, ...], list[tuple[bool, float, float]]]:
    sweep = only_sweep(place)
    return sweep.sizes, places(sweep)


def test_rows_that_differ_in_more_than_how_much_goes_are_sweeps_of_their_own(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for linear, ratios in ((True, (0.5, 0.75)), (False, (0.6, 0.7))):
        for ratio in ratios:
            settings = {"pruner": {"ratio": ratio, "linear": linear}}
            top1 = {"large": 94.0, "lottery": 91.0}
            write_run(0, top1, target={"ratio": ratio}, params=round(200 * (1 - ratio)), settings=settings)
    assert [(s.title, [size.pruned_by for size in s.sizes]) for s in only_table(tmp_path / "runs").sweeps] == [
        ("vgg16, l1, pruner.linear true", ["l1 ratio 0.5", "l1 ratio 0.75"]),
        ("vgg16, l1, pruner.linear false", ["l1 ratio 0.6", "l1 ratio 0.7"]),
    ]


def test_a_summary_says_what_share_of_parameters_remains_where_no_unpruned_network_was_trained(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(0, {"scratch_e": 90.0}, ledger={"macs_reference": 1000, "params_unpruned": 200})
    (row,) = only_table(tmp_path / "runs").rows
    assert row.params_kept is not None
    assert row.params_kept.mean == 25.0


def test_without_the_unpruned_network_sizes_are_those_in_macs(write_run: WriteRun, tmp_path: Path) -> None:
    for macs, ratio in ((500, 0.5), (250, 0.75)):
        write_run(0, {"scratch_e": 90.0, "lottery": 91.0}, target={"ratio": ratio}, macs=macs, pruner="snip")
    sweep = only_sweep(tmp_path / "runs")
    assert [(size.params_kept, size.macs_kept and size.macs_kept.mean) for size in sweep.sizes] == [
        (None, 50),
        (None, 25),
    ]
    (axes,) = remaining_figure(sweep).axes
    assert axes.get_xlabel() == "MACs that remain (%)"


def test_the_picture_has_panels_for_one_cut_and_rounds_and_a_level_for_the_unpruned_network(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        for params, ratio in ((50, 0.75), (100, 0.5)):
            top1 = {"large": 94.0 + seed, "lottery": 91.0, "reshuffle": 90.0}
            write_run(seed, top1, target={"ratio": ratio}, params=params, large_stage=f"large-{seed}")
        write_rounds(write_run, seed, 3, {"lottery": 90.0, "weight_rewind": 90.5})
    figure = remaining_figure(only_sweep(tmp_path / "runs"))
    cut, _, rounds, over_macs = figure.axes
    assert (cut.get_ylabel().split("\n")[0], rounds.get_ylabel().split("\n")[0]) == ("one cut", "in rounds")
    assert (rounds.get_xscale(), rounds.xaxis_inverted()) == ("log", True)
    assert (rounds.get_xlabel(), over_macs.get_xlabel()) == ("parameters that remain (%)", "MACs that remain (%)")
    assert [text.get_text() for text in rounds.get_xticklabels()] == ["50", "25", "12.5"]
    for axes in figure.axes:
        level = next(line for line in axes.lines if line.get_label() == "unpruned")
        assert list(level.get_ydata()) == [94.5, 94.5]
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in rounds.containers}
    assert drawn == {"ticket": [[12.5, 90], [25, 92.05], [50, 93.05]], "rewound": [[12.5, 90.5]]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["unpruned", "ticket", "random ticket", "rewound"]


def test_tables_hold_sizes_and_rounds_and_no_paths_and_the_same_report_is_made_again(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        write_rounds(write_run, seed, 3, {"lottery": 90.0 + seed, "finetune": 91.0})
    out = tmp_path / "report"
    assert main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    with (out / "rounds-1.csv").open() as opened:
        rounds = list(csv.DictReader(opened))
    assert [row["pruned by"] for row in rounds] == ["l1 share_per_round 0.5 in 3 rounds"] * 3
    first, _, last = rounds
    assert (first["round"], first["parameters"], first["parameters kept, %"], first["MACs"]) == (
        *("1", "100.0", "50.0", "600.0"),
    )
    assert [row["channels"] for row in rounds] == ["29.0", "28.0", "27.0"]
    assert (first["before"], first["pruned"], first["statistics re-estimated"]) == ("94.0", "49.0", "59.0")
    assert (float(first["trained"]), first["trained n"], first["epochs"]) == (pytest.approx(93.05), "2", "4.0")
    assert (last["round"], last["trained"], last["epochs"]) == ("3", "", "")
    with (out / "remaining-1.csv").open() as opened:
        sizes = list(csv.DictReader(opened))
    assert [(row["cut"], row["parameters kept, %"], float(row["ticket"])) for row in sizes] == [
        *(("in rounds", "50.0", pytest.approx(93.05)), ("in rounds", "25.0", pytest.approx(92.05))),
        ("in rounds", "12.5", 90.5),
    ]
    assert {row["unpruned"] for row in sizes} == {"94.5"}
    assert (out / "remaining-01.svg").exists()
    assert not list(out.glob("targets-*"))
    results = (out / "results.json").read_text()
    assert "/store/" not in results
    assert json.loads(results)["tables"][0]["rows"][0]["rounds"][0]["top1_trained"]["n"] == 2
    assert main([str(out / "results.json"), "--out", str(tmp_path / "again")]) == 0
    before, again = ((folder / "report.html").read_text() for folder in (out, tmp_path / "again"))
    assert again == before


def test_studies_of_different_numbers_of_rounds_are_rows_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for rounds in (3, 2):
        write_rounds(write_run, 0, rounds, {"lottery": 90.0})
    rows = only_table(tmp_path / "runs").rows
    assert [row.pruned_by for row in rows] == [f"l1 share_per_round 0.5 in {rounds} rounds" for rounds in (2, 3)]


def test_the_papers_row_does_not_stand_beside_a_study_in_rounds(write_run: WriteRun, tmp_path: Path) -> None:
    options: dict[str, Any] = {"experiment": "l1_vgg16_cifar10", "target": {"variant": "A"}}
    write_run(0, {"large": 94.0, "scratch_e": 93.0}, settings={"pruner": {"rounds": 2}}, **options)
    (row,) = only_table(tmp_path / "runs").rows
    assert row.paper is None


def test_trainings_between_rounds_are_ancestors_that_rows_share(write_run: WriteRun, tmp_path: Path) -> None:
    for rounds in (2, 3):
        write_rounds(write_run, 0, rounds, {"finetune": 91.0, "lottery": 90.0, "scratch_e": 90.0})
    two, three = ({arm.arm: arm for arm in row.arms} for row in only_table(tmp_path / "runs").rows)
    large, between, own = 4 * 5e14, 1e15, 4 * 2.5e14
    assert two["lottery"].flops_total == pytest.approx(large + between + own)
    assert three["lottery"].flops_total == pytest.approx(large + 2 * between + own)
    # Both rows build on the unpruned network and on the first training; the second one is the longer study's alone.
    for arm in ("lottery", "finetune"):
        assert two[arm].train_flops_amortised == pytest.approx(large / 2 + between / 2 + own)
        assert three[arm].train_flops_amortised == pytest.approx(large / 2 + between / 2 + between + own)
    assert [each["finetune"].notation for each in (two, three)] == ["P_8-R_4", "P_12-R_4"]
    assert (three["lottery"].notation, three["scratch_e"].notation) == ("T_4", "S_4")


def test_of_two_copies_of_a_run_the_one_with_more_rounds_counts(write_run: WriteRun, tmp_path: Path) -> None:
    full = write_rounds(write_run, 0, 3, {"lottery": 90.0})
    summary = json.loads((full / "summary.json").read_text())
    summary["rounds"] = summary["rounds"][:1]
    summary["arms"] = {}
    for name in ("before", "later"):
        (tmp_path / f"runs/{name}").mkdir()
        (tmp_path / f"runs/{name}/summary.json").write_text(json.dumps(summary))
    (row,) = only_table(tmp_path / "runs").rows
    assert [each.round for each in row.rounds] == [1, 2, 3]
