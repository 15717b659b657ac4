"""A whole small study by each pruner, every arm of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import configure
from rethink_prune import count_cost, load_model
from rethink_prune.errors import UserError
from rethink_prune.pruning import PRUNERS
from rethink_prune.store.metrics import read_metrics
from rethink_prune.study.run import run_study
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.interrupts import Interrupts

Run = Callable[..., dict[str, Any]]

DIGITS = (3, 8, 8)
# sss has no ratio: at this strength, nearly all factors reach zero in the few steps there are, and scratch_b is long.
OPTIONS = {
    "sss": ["pruner.sparse.strength=10", "dataset.train_limit=60", "recipe.epochs=1"],
    "thinet": ["pruner.images=100"],
    "regression": ["pruner.images=100"],
    # Nothing else trains the unpruned network for them.
    **{name: ["large.baseline=true"] for name, found in PRUNERS.items() if found.at_start},
}
INHERITED = [name for name, found in PRUNERS.items() if not found.fresh_only]
CASES = [*((name, OPTIONS.get(name, [])) for name in INHERITED), ("soft_filter", ["pruner.scope=all"])]
# Like others, as far as a whole study is concerned.
ALIKE = {"fpgm", "taylor", "lamp", "grasp", "synflow", "random", "torch_pruning"}


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        pytest.param(
            name,
            options,
            id=f"{name}-all" if "pruner.scope=all" in options else name,
            marks=pytest.mark.slow if name in ALIKE else (),
        )
        for name, options in CASES
    ],
)
def test_every_arm_of_a_study(pruner: str, options: list[str], small_study: Run) -> None:
    summary = small_study(f"pruner={pruner}", "arms=[finetune,scratch_e,scratch_b,large_longer]", *options)

    pruned, large = summary["pruned"], summary["large"]
    assert pruned["macs"] < large["macs"]
    assert pruned["params"] < large["params"]
    assert sum(layer["kept"] for layer in pruned["layers"]) < sum(layer["full"] for layer in pruned["layers"])
    assert ("sparse" in summary) == PRUNERS[pruner].trains_sparse
    arms = summary["arms"]
    assert [entry["status"] for entry in arms.values()] == ["done"] * 4
    longer = large["epochs"] * large["macs"] // pruned["macs"]
    assert arms["scratch_b"]["epochs"] == arms["large_longer"]["epochs"] == longer

    # What fine-tuning costs: the training whose weights it inherits, and its own.
    base = summary["sparse"] if PRUNERS[pruner].trains_sparse else large
    before = 0 if PRUNERS[pruner].at_start else base["train_flops"]
    assert arms["finetune"]["train_flops_total"] == before + arms["finetune"]["train_flops"]
    assert arms["scratch_e"]["train_flops_total"] == arms["scratch_e"]["train_flops"]

    # Every stage of the pruned network has its architecture, masks included, and loads again.
    for folder in [pruned["stage"], *(arms[name]["stage"] for name in ("finetune", "scratch_e", "scratch_b"))]:
        model, masks = load_model(folder), Architecture.load(Path(folder)).masks
        cost = count_cost(model, DIGITS, masks=masks)
        assert (cost.params, cost.macs) == (pruned["params"], pruned["macs"])
        for name, mask in masks.items():
            assert not model.get_parameter(name)[~mask].any(), f"{name}: a masked weight moved"


@pytest.mark.slow
def test_strengths_remove_something_and_the_network_still_learns(tmp_path: Path) -> None:
    """The default study, but for the size of the images: only a whole training shows what a strength does.

    So small, `sss` takes a little more than its default.
    """
    for pruner, strength in (("slimming", []), ("sss", ["pruner.sparse.strength=0.2"])):
        config = configure(
            f"pruner={pruner}",
            *strength,
            "arms=[finetune]",
            "dataset.image_size=8",
            "precision=fp32",
            "device=cpu",
            f"store.root={tmp_path / 'store'}",
        )
        with Interrupts() as interrupts:
            summary = run_study(config, tmp_path / pruner, interrupts)
        assert 0.2 < summary["pruned"]["macs"] / summary["large"]["macs"] < 0.8
        for entry in (summary["sparse"], summary["pruned"], summary["arms"]["finetune"]):
            assert entry["top1"] > 93, "the unpruned network reaches 99"


def test_sparse_training_starts_where_large_does_and_is_compared_with_it(small_study: Run) -> None:
    summary = small_study("pruner=slimming", "arms=[finetune]", "pruner.sparse.strength=1e-12")
    plain, sparse = (load_model(summary[name]["stage"]).state_dict() for name in ("large", "sparse"))
    assert summary["large"]["stage"] != summary["sparse"]["stage"]
    # With next to no penalty, the same initial weights and batches lead to the same network.
    for name, tensor in plain.items():
        torch.testing.assert_close(sparse[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_pace_knows_what_it_does_not_know(small_study: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        small_study("pruner=slimming", "arms=[finetune,scratch_b]")
    told = [record.getMessage() for record in caplog.records if "the study will take" in record.getMessage()]
    assert [line.split(":")[0] for line in told] == ["large", "sparse", "scratch_b"], "one epoch has no pace"
    assert [line.endswith("and what follows pruning") for line in told] == [True, True, False]
    assert not any("-" in line.split("about")[1] for line in told), "a time that is left cannot be negative"


def test_a_sweep_over_ratios_trains_sparse_once_if_the_ratio_does_not_decide_it(
    small_study: Run, tmp_path: Path
) -> None:
    def trained(*overrides: str) -> int:
        small_study("arms=[finetune]", *overrides)
        return len(list((tmp_path / "store/stages").glob("sparse-*")))

    assert trained("pruner=slimming", "pruner.ratio=0.3") == 1
    assert trained("pruner=slimming", "pruner.ratio=0.5") == 1
    assert trained("pruner=slimming", "pruner.sparse.strength=1e-3") == 2
    assert trained("pruner=soft_filter", "pruner.ratio=0.3") == 3
    assert trained("pruner=soft_filter", "pruner.ratio=0.5") == 4


def test_scratch_arms_of_a_known_target_train_nothing_else(small_study: Run, tmp_path: Path) -> None:
    for pruner in ("soft_filter", "thinet", "regression", "random"):
        summary = small_study(f"pruner={pruner}", "arms=[scratch_e]")
        assert "large" not in summary
        assert "sparse" not in summary
    kinds = {path.name.split("-")[0] for path in (tmp_path / "store/stages").iterdir()}
    assert kinds == {"scratch"}


def test_scratch_arms_that_wait_for_a_failed_training_say_so(small_study: Run) -> None:
    with pytest.raises(UserError, match=r"sparse failed: .*; scratch_e failed: sparse failed, so it is not known"):
        small_study("pruner=slimming", "recipe.lr=1e30", "arms=[scratch_e]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner=slimming", "model.name=no_norms:build"], "ranks channels by the scales of batch norms, and"),
        (["pruner=thinet", "pruner.images=1"], "pruner.images"),
        (["pruner=regression", "pruner.images=1"], "pruner.images"),
        (["pruner=thinet", "pruner.variant=conv", "pruner.ratio=null"], "has no such variant of resnet20"),
    ],
)
def test_what_does_not_fit_is_said_before_any_training(
    overrides: list[str], message: str, small_study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_norms.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        small_study(*overrides)
    assert not list(tmp_path.glob("store/stages/*"))


def test_soft_filters_grow_again_and_the_summary_says_how_many(small_study: Callable[..., dict[str, Any]]) -> None:
    run = small_study("pruner=soft_filter", "arms=[finetune]", "recipe.epochs=4", "dataset.train_limit=400")
    rows = read_metrics(Path(run["sparse"]["stage"]))
    shares = [row["regrown"] for row in rows if "regrown" in row]
    assert [int(row["epoch"]) for row in rows if "regrown" in row] == [2, 3, 4]
    assert max(shares) > 5
    assert run["sparse"]["regrown"] == pytest.approx(sum(shares) / 3)


@pytest.mark.parametrize("pruner", ["thinet", "regression"])
def test_the_number_of_sampled_images_decides_what_is_pruned(pruner: str, small_study: Run) -> None:
    few, all_images = (
        small_study(f"pruner={pruner}", "arms=[finetune]", "pruner.ratio=0.2", "dataset.train_limit=60", images)
        for images in ("pruner.images=30", "pruner.images=null")
    )
    assert few["pruned"]["stage"] != all_images["pruned"]["stage"]
    assert few["large"]["stage"] == all_images["large"]["stage"]
