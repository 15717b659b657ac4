"""What a report says of runs: arms, comparisons and their verdicts, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.results import Report, ResultRow, compute_report

WriteRun = Callable[..., Path]


def report(place: Path, *, margin: float = 0.5, mix: bool = False) -> Report:
    gathered = gather([place])
    return compute_report(group_runs(gathered.runs, mix=mix), margin=margin, problems=gathered.problems)


def only_row(place: Path, **options: float) -> ResultRow:
    ((row,),) = [table.rows for table in report(place, **options).tables]
    return row


@pytest.fixture
def verdicts(write_run: WriteRun, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function from fine-tuning's and Scratch-B's accuracies over seeds to the verdicts."""

    def of(finetune: Sequence[float], scratch_b: Sequence[float], *, one_large: bool = False) -> list[str]:
        for seed, (a, b) in enumerate(zip(finetune, scratch_b, strict=True)):
            top1 = {"large": 94.0, "finetune": a, "scratch_b": b}
            write_run(seed, top1, arms=["finetune", "scratch_b"], large_stage="large-one" if one_large else None)
        return [comparison.verdict for comparison in only_row(tmp_path / "runs").comparisons]

    return of


CONDITIONS = "(paper recipe, paper budget, fp32)"
PAIR = f"Scratch-B and fine-tuning {CONDITIONS}"
UNDECIDED = f"Undecided: {PAIR} are shown neither to differ nor to be equivalent within 0.5 points: "
FINETUNE = [93.0, 93.1, 92.9, 93.2, 92.8, 93.0, 93.1, 92.9]


@pytest.mark.parametrize(("gains", "said"), [
    (
        (1.1, 1.4, 0.9, 1.2, 1.3, 1.0, 1.2, 1.1),
        f"Scratch-B is better than fine-tuning {CONDITIONS} by 1.15 points [1.02, 1.28], n = 8.",
    ),
    (
        (-1.1, -1.4, -0.9, -1.2, -1.3, -1.0, -1.2, -1.1),
        f"Fine-tuning is better than Scratch-B {CONDITIONS} by 1.15 points [1.02, 1.28], n = 8.",
    ),
    (
        (0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2),
        f"Scratch-B is better than fine-tuning {CONDITIONS} by 0.15 points [0.11, 0.19], n = 8, a difference within "
        "the margin of 0.5 points.",
    ),
    (
        (0.1, -0.2, 0.1, -0.1, 0.2, 0.0, 0.1, -0.1),
        f"Scratch-B and fine-tuning {CONDITIONS} are equivalent within 0.5 points: Scratch-B has 0.01 points more "
        "[-0.10, 0.13], n = 8.",
    ),
    (
        (2.1, -2.2, 2.5, -2.1, 2.2, -1.0, 1.1, -0.1),
        f"{UNDECIDED}Scratch-B has 0.31 points more [-1.30, 1.93], n = 8.",
    ),
    (
        (1.0, -1.0, 2.0, -2.0),
        f"{UNDECIDED}their means are equal: 0.00 points [-2.91, 2.91], n = 4; 4 seeds cannot show a difference: the "
        "smallest p they allow is 0.12.",
    ),
    (
        (0.1, 1.2, 0.3, 1.5, -0.2, 0.9, 1.3, -0.1),
        f"{UNDECIDED}Scratch-B has 0.62 points more [0.06, 1.19], n = 8; p = 0.062, and 0.05 is needed.",
    ),
    (
        (0.1, 0.1, 0.1, 0.1, 0.1, 5.1),
        f"Scratch-B and fine-tuning {CONDITIONS}: Scratch-B has 0.93 points more [-1.21, 3.08], n = 6; the "
        "permutation test shows a difference (p = 0.031), the interval does not: the differences are spread too "
        "unevenly to say more.",
    ),
    (
        (3.1, 3.2, 3.0),
        f"{UNDECIDED}Scratch-B has 3.10 points more [2.85, 3.35], n = 3; 3 seeds cannot show a difference: "
        "the smallest p they allow is 0.25.",
    ),
    (
        (0.5, 0.5, 0.5),
        f"Scratch-B is ahead of fine-tuning {CONDITIONS} by 0.50 points in each of 3 seeds: no spread, no interval; 3 "
        "seeds cannot show a difference: the smallest p they allow is 0.25.",
    ),
    (
        (0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
        f"Scratch-B is better than fine-tuning {CONDITIONS} by 0.50 points in each of 6 seeds: no spread, no interval.",
    ),
    (
        (0.0, 0.0),
        f"Scratch-B and fine-tuning {CONDITIONS} end at the same accuracy in each of 2 seeds: no interval.",
    ),
    ((0.4,), f"Scratch-B is 0.40 points above fine-tuning {CONDITIONS} with one seed: no interval and no test."),
    ((0.0,), f"Scratch-B equals fine-tuning {CONDITIONS} with one seed: no interval and no test."),
])  # fmt: skip
def test_verdicts(gains: tuple[float, ...], said: str, verdicts: Callable[..., list[str]]) -> None:
    finetune = FINETUNE[: len(gains)]
    assert verdicts(finetune, [a + gain for a, gain in zip(finetune, gains, strict=True)]) == [said]


def test_verdicts_say_when_all_seeds_share_one_pretrained_network(
    verdicts: Callable[..., list[str]], tmp_path: Path
) -> None:
    (said,) = verdicts(FINETUNE, [a + 1 + 0.01 * i for i, a in enumerate(FINETUNE)], one_large=True)
    assert said.endswith(" All seeds share one pretrained network: what training another would change is left out.")
    assert "seeds 0, 1, 2, 3, 4, 5, 6, 7 share one pretrained network, large-one" in only_row(tmp_path / "runs").notes


def test_verdicts_rest_on_the_last_epoch(write_run: WriteRun, tmp_path: Path) -> None:
    file = write_run(0, {"finetune": 93.0, "scratch_b": 92.0}) / "summary.json"
    file.write_text(file.read_text().replace('"top1_best": 92.1', '"top1_best": 99.0'))
    row = only_row(tmp_path / "runs")
    assert "Fine-tuning is 1.00 points above Scratch-B" in row.comparisons[1].verdict
    scratch_b = row.arm("scratch_b")
    assert scratch_b is not None
    assert scratch_b.top1_best is not None
    assert (scratch_b.top1_best.mean, row.best) == (99.0, ("finetune",))


def test_p_values_are_corrected_for_the_whole_table(write_run: WriteRun, tmp_path: Path) -> None:
    for ratio in (0.3, 0.5):
        for seed in range(6):
            top1 = {"finetune": 93.0, "scratch_e": 93.5 + seed / 100, "scratch_b": 94.0 + seed / 100}
            write_run(seed, top1, target={"ratio": ratio})
    (table,) = report(tmp_path / "runs").tables
    comparisons = [comparison for row in table.rows for comparison in row.comparisons]
    assert [c.difference.p for c in comparisons if c.difference] == pytest.approx([2 / 64] * 4)
    assert [c.p_holm for c in comparisons] == pytest.approx([8 / 64] * 4)
    assert all(
        "6 seeds cannot show a difference among 4 comparisons: the smallest p they allow is 0.031, 0.12 after"
        in c.verdict
        for c in comparisons
    )


def test_pairs_are_the_seeds_that_have_both_arms(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"finetune": 93.0, "scratch_b": 94.0}, arms=["finetune", "scratch_b"])
    write_run(1, {"finetune": 93.5, "scratch_b": "the loss became nan in epoch 2"}, arms=["finetune", "scratch_b"])
    write_run(2, {"scratch_b": 94.5}, arms=["finetune", "scratch_b"])
    write_run(3, {"finetune": 93.2, "scratch_b": 94.1}, arms=["finetune", "scratch_b"])
    write_run(4, {"finetune": 93.2, "scratch_b": float("nan")}, arms=["finetune", "scratch_b"])
    write_run(5, {"finetune": 93.2}, arms=["finetune"])
    row = only_row(tmp_path / "runs")
    (comparison,) = row.comparisons
    assert comparison.seeds == (0, 3)
    assert comparison.difference is not None
    assert comparison.difference.mean == pytest.approx(0.95)
    assert row.notes[1:] == (
        "seed 2: fine-tuning is not finished",
        "seed 1: Scratch-B failed: the loss became nan in epoch 2",
        "seed 4: Scratch-B has no accuracy (not a number)",
        "seed 5: Scratch-B was not asked for",
    )


def test_a_run_that_has_only_begun_is_shown_as_unfinished(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {})
    row = only_row(tmp_path / "runs")
    assert "seed 0: Scratch-E is not finished" in row.notes
    assert row.comparisons[0].verdict == f"Scratch-E and fine-tuning {CONDITIONS} cannot be compared: no seed has both."
    assert row.best == ()


def test_without_fine_tuning_scratch_arms_are_compared(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"scratch_e": 93.0, "scratch_b": 94.0}, arms=["scratch_e", "scratch_b"])
    (comparison,) = only_row(tmp_path / "runs").comparisons
    assert (comparison.first, comparison.second) == ("scratch_b", "scratch_e")


def test_arms_of_different_numbers_of_processes_are_noted(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(seed, {"finetune": 93.0, "scratch_e": 93.0}, processes={"finetune": [1], "scratch_e": [2, 4]})
    notes = only_row(tmp_path / "runs").notes
    assert "arms were trained by different numbers of processes: 1 in finetune; 2 and 4 in scratch_e" in notes


def test_curves_end_at_the_means_of_the_table(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(seed, {"large": 94.0, "finetune": 93.0 + seed, "scratch_b": 94.0})
    finetune = only_row(tmp_path / "runs").arm("finetune")
    assert finetune is not None
    curve = finetune.curve
    assert curve is not None
    assert curve.flops is not None
    assert curve.epoch == (1, 2, 3, 4)
    assert (curve.low[-1], curve.mean[-1], curve.high[-1]) == (93.0, 93.5, 94.0)
    assert (curve.flops[0], curve.flops[-1]) == (2.25e15, 3e15)  # it starts where the unpruned network's training ends


def test_the_papers_row_stands_beside_its_experiment(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"large": 94.0, "scratch_e": 93.0}, experiment="l1_vgg16_cifar10", target={"variant": "A"})
    row = only_row(tmp_path / "runs")
    assert row.paper is not None
    assert row.paper.top1["scratch_e"].mean == 93.62
    assert "not comparable with the paper: trained for 4 epochs instead of 160" in row.notes


def test_another_target_is_not_the_papers_row(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, {"large": 94.0}, experiment="l1_vgg16_cifar10", target={"ratio": 0.5})
    assert only_row(tmp_path / "runs").paper is None
