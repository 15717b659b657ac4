"""Efficiency curves: error over size for methods of pruning, and what they show at equal size."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rethink_prune.report.__main__ import main
from rethink_prune.report.efficiency import EfficiencyCurves
from rethink_prune.report.efficiency_plot import efficiency_figure
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.results import compute_report

WriteRun = Callable[..., Path]
TRAINED = "Scratch-E, paper recipe, paper budget, fp32"
# Top-1 of a seed by size in parameters.
Sizes = Mapping[int, float]


def write_method(write: WriteRun, pruner: str, by_seed: Sequence[Sizes], **options: Any) -> None:
    """Write the runs of a method: top-1 after Scratch-E by parameters; MACs are ten times as many."""
    arm = options.pop("arm", "scratch_e")
    for seed, sizes in enumerate(by_seed):
        for number, (params, top1) in enumerate(sizes.items()):
            target = {"ratio": round(0.9 - 0.1 * number, 1)}
            write(
                seed, {arm: top1}, pruner=pruner, target=target, params=params, macs=10 * params, arms=[arm], **options
            )


def found_curves(place: Path, *, margin: float = 0.5, by: tuple[str, ...] = ()) -> tuple[EfficiencyCurves, ...]:
    (table,) = compute_report(group_runs(gather([place / "runs"]).runs, by=by), margin=margin).tables
    return table.efficiency


def only_curves(place: Path) -> EfficiencyCurves:
    (curves,) = found_curves(place)
    return curves


def test_methods_are_compared_between_their_sizes_in_log_size_and_nowhere_else(
    write_run: WriteRun, tmp_path: Path
) -> None:
    # Uniform rises by a point each time the size doubles; slimming is half a point above, and one more at its end.
    uniform = {100: 90.0, 200: 91.0, 400: 92.0, 800: 93.0}
    for seed in range(3):
        spread = 0.1 * seed
        write_method(write_run, "uniform", [{}] * seed + [uniform])
        write_method(write_run, "slimming", [{}] * seed + [{200: 91.5 + spread, 1600: 94.5 + 1 + spread}])
    curves = only_curves(tmp_path)
    params, macs = curves.matched
    assert (params.measure, params.smallest, params.largest) == ("params", pytest.approx(200), pytest.approx(800))
    assert (macs.measure, macs.smallest, macs.largest) == ("macs", pytest.approx(2000), pytest.approx(8000))
    # From 200 to 1,600 slimming rises by 4 / 3 points a doubling: half a point above at 200, 1 / 2 + 2 / 3 at 800.
    assert params.gap_smallest == pytest.approx(0.5 + 0.1)
    assert params.gap_largest == pytest.approx(0.5 + 2 / 3 + 0.1)
    difference = params.comparison.difference
    assert difference is not None
    assert (difference.n, difference.mean) == (3, pytest.approx(0.5 + 1 / 3 + 0.1))
    assert difference.interval == pytest.approx((14 / 15 - 4.302653 * 0.1 / 3**0.5, 14 / 15 + 4.302653 * 0.1 / 3**0.5))
    # Both measures are one family: with three seeds no p is below 1 / 4.
    assert (params.comparison.p_holm, params.comparison.p_holm_floor) == (0.5, 0.5)
    assert params.verdict.startswith(
        "At equal parameters, averaged over 200 to 800: Undecided: Slimming and uniform (Scratch-E, paper"
    )
    assert params.verdict.endswith(
        "slimming minus uniform, is +0.60 points at the smallest size and +1.27 at the largest."
    )


def test_enough_seeds_show_a_difference_and_small_ones_are_equivalent(write_run: WriteRun, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one, other, third = rng.normal(0, 0.1, (3, 8, 2)).tolist()
    write_method(write_run, "uniform", [{100: 90.0 + a, 400: 92.0 + b} for a, b in one])
    write_method(write_run, "slimming", [{100: 91.0 + a, 400: 93.0 + b} for a, b in other])
    write_method(write_run, "random", [{100: 90.05 + a, 400: 92.0 + b} for a, b in third])
    said = {each.pruned_by: each.verdict for each in only_curves(tmp_path).matched if each.measure == "params"}
    better = "Slimming is better than uniform (Scratch-E, paper recipe, paper budget, fp32)"
    assert said["slimming"].startswith(f"At equal parameters, averaged over 100 to 400: {better} by ")
    assert "equivalent within 0.5 points" in said["random"]


def test_curves_that_cross_are_not_told_by_their_mean_alone(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}, {100: 90.1, 400: 92.0}])
    write_method(write_run, "slimming", [{100: 91.0, 400: 91.0}, {100: 91.0, 400: 91.0}])
    comparison = only_curves(tmp_path).matched[0]
    assert comparison.comparison.difference is not None
    assert comparison.comparison.difference.mean == pytest.approx(-0.025)
    assert comparison.verdict.endswith("and -1.00 at the largest: the curves cross, so it depends on the size.")


def test_seeds_are_paired_and_those_without_sizes_of_both_are_named(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}, {100: 80.0, 400: 82.0}, {100: 91.0}])
    write_method(write_run, "slimming", [{100: 91.0, 400: 93.0}, {100: 82.0, 400: 84.0}])
    write_method(write_run, "slimming", [{}, {}, {}, {100: 91.0, 400: 93.0}])
    comparison = only_curves(tmp_path).matched[0]
    assert comparison.comparison.seeds == (0, 1)
    assert comparison.comparison.difference is not None
    assert comparison.comparison.difference.mean == pytest.approx(1.5)
    assert comparison.verdict.endswith("Left out, without sizes of both to compare: seeds 3.")


@pytest.mark.parametrize(
    ("slimming", "said"),
    [
        (
            [{}, {1000: 94.0, 2000: 95.0}],
            "no seed has two sizes or more of both slimming and uniform.",
        ),
        (
            [{1000: 94.0, 2000: 95.0}],
            "their sizes do not overlap: slimming has 1,000 to 2,000, uniform has 100 to 400.",
        ),
    ],
)
def test_without_common_seeds_or_sizes_nothing_is_compared(
    slimming: list[Sizes], said: str, write_run: WriteRun, tmp_path: Path
) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}])
    write_method(write_run, "slimming", slimming)
    comparison = only_curves(tmp_path).matched[0]
    assert comparison.verdict == f"At equal parameters, slimming and uniform ({TRAINED}) cannot be compared: {said}"
    assert (comparison.smallest, comparison.comparison.difference) == (None, None)
    assert len(efficiency_figure(only_curves(tmp_path)).axes) == 2


def test_there_are_no_curves_without_two_methods_of_two_sizes_from_scratch(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}])
    write_method(write_run, "slimming", [{100: 91.0}])
    write_method(write_run, "random", [{100: 91.0, 400: 92.0}], arm="finetune")
    assert found_curves(tmp_path) == ()


def test_other_pruners_are_drawn_but_only_uniform_pruning_is_compared_with(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "l1", [{100: 90.0, 400: 92.0}])
    write_method(write_run, "slimming", [{100: 91.0, 400: 93.0}])
    curves = only_curves(tmp_path)
    assert [curve.method for curve in curves.methods] == ["l1", "slimming"]
    assert curves.matched == ()
    assert curves.verdicts == [
        "No verdict on l1, slimming at equal size: no uniform pruning of the same layers has two sizes or more "
        "(pruner=uniform)."
    ]


def test_channels_are_not_compared_with_single_weights(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}])
    write_method(write_run, "magnitude", [{100: 91.0, 400: 93.0}])
    for path in (tmp_path / "runs").rglob("summary.json"):
        content = json.loads(path.read_text())
        if content["study"]["pruner"] == "magnitude":
            content["pruned"]["layers"] = [{"layer": "features.0", "kept": 800, "full": 1728}]
            path.write_text(json.dumps(content))
    assert only_curves(tmp_path).uncompared == ("magnitude",)


def test_each_arm_has_its_curves_and_settings_that_differ_set_methods_apart(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for arm, options in (
        ("scratch_e", {}),
        ("scratch_b", {}),
        ("scratch_e", {"model": "vgg19", "settings": {"recipe": {"lr": 0.2}}}),
    ):
        write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}], arm=arm, **options)
        write_method(write_run, "slimming", [{100: 91.0, 400: 92.0}], arm=arm, model=options.get("model", "vgg16"))
    scope = {"settings": {"pruner": {"scope": "all"}}}
    write_method(write_run, "fpgm", [{100: 91.0, 400: 92.0}], settings={"pruner": {"scope": "inner"}})
    write_method(write_run, "fpgm", [{}, {110: 91.0, 410: 92.0}], **scope)
    found = found_curves(tmp_path, by=("pruner.scope",))
    # The two of VGG-19 were trained in other ways.
    assert {(curves.title, tuple(curve.method for curve in curves.methods)) for curves in found} == {
        ("vgg16, Scratch-E", ("fpgm, pruner.scope inner", "fpgm, pruner.scope all", "slimming", "uniform")),
        ("vgg16, Scratch-B", ("slimming", "uniform")),
    }


def test_sources_of_guided_pruning_change_with_the_size_and_experiments_tell_its_methods_apart(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}])
    for name, params in (("search_guided", 100), ("search_guided", 400), ("search_transferred", 110)):
        sources = {"settings": {"pruner": {"sources": [f"{name} {params}"], "size": 1.0}}, "target": {"size": 1.0}}
        for seed in (0, 1):
            top1 = {"scratch_e": 91.0 + params / 1000}
            options = {"pruner": "guided", "experiment": name, "arms": ["scratch_e"]}
            write_run(seed, top1, params=params, macs=10 * params, **options, **sources)
    (curves,) = found_curves(tmp_path, by=("pruner.sources",))
    # The transferred one has a single size.
    assert [(curve.method, len(curve.sizes)) for curve in curves.methods] == [
        ("guided, experiment search_guided", 2),
        ("uniform", 2),
    ]


def test_the_front_is_where_nothing_is_both_as_small_and_as_good(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 200: 90.5, 400: 92.0}])
    write_method(write_run, "slimming", [{150: 91.0, 300: 91.0, 400: 92.0}])
    front = {
        curve.method: [size.params for size in curve.sizes if "params" in size.front]
        for curve in only_curves(tmp_path).methods
    }
    assert front == {"uniform": [100, 400], "slimming": [150, 400]}


def test_the_papers_curves_are_drawn_for_its_network_and_enter_no_verdict(write_run: WriteRun, tmp_path: Path) -> None:
    for dataset in ("cifar10", "digits"):
        write_method(write_run, "uniform", [{2_000_000: 91.0, 8_000_000: 93.0}], dataset=dataset)
        write_method(write_run, "slimming", [{2_000_000: 93.0, 8_000_000: 94.0}], dataset=dataset)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    tables = {t["dataset"]: t for t in json.loads((tmp_path / "report/results.json").read_text())["tables"]}
    with_paper, without = (tables[name]["efficiency"][0] for name in ("cifar10", "digits"))
    assert [(line["method"], line["figure"]) for line in with_paper["paper"]] == [
        ("uniform", "3, left"),
        ("slimming", "3, left"),
    ]
    assert with_paper["paper"][1]["points"][0] == pytest.approx([2.45e6, 6.31])
    assert without["paper"] == []
    assert with_paper["matched"] == without["matched"]
    curves = found_curves_of(tmp_path, "cifar10")
    labels = efficiency_figure(curves).axes[0].get_legend_handles_labels()[1]
    assert labels[2:] == [f"{name}, figure 3, left (read from the figure)" for name in ("uniform", "slimming")]
    assert efficiency_figure(curves).axes[0].get_xscale() == "log"


def found_curves_of(place: Path, dataset: str) -> EfficiencyCurves:
    tables = compute_report(group_runs(gather([place / "runs"]).runs), margin=0.5).tables
    return next(table.efficiency[0] for table in tables if table.dataset == dataset)


def test_a_report_shows_them_in_words_tables_and_a_picture(write_run: WriteRun, tmp_path: Path) -> None:
    write_method(write_run, "uniform", [{100: 90.0, 400: 92.0}, {100: 90.2, 400: 92.2}])
    write_method(write_run, "slimming", [{100: 91.0, 400: 92.5}, {100: 91.1, 400: 92.8}])
    report = tmp_path / "report"
    assert main([str(tmp_path / "runs"), "--out", str(report)]) == 0
    for page in ("report.html", "report.md"):
        assert "At equal parameters, averaged over 100 to 400: " in (report / page).read_text()
    with (report / "efficiency-1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["parameters"], row["front"]) for row in rows] == [
        *(("slimming", "100.0", "parameters, MACs"), ("slimming", "400.0", "parameters, MACs")),
        *(("uniform", "100.0", ""), ("uniform", "400.0", "")),
    ]
    assert [float(row["error, %"]) for row in rows] == pytest.approx([8.95, 7.35, 9.9, 7.9])
    with (report / "matched-1.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["equal"], row["smallest"], row["largest"], row["n"]) for row in rows]
    assert found == [("parameters", "100", "400", "2"), ("MACs", "1000", "4000", "2")]
    assert float(rows[0]["difference"]) == pytest.approx(0.75)
    assert (report / "efficiency-01-1.svg").exists()
