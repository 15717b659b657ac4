"""Targets become widths, scores become drops."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.pruning.selection import (
    Limits,
    WantedCost,
    drop_lowest,
    explicit_widths,
    global_threshold,
    kept_count,
    widths_for_global_ratio,
    widths_for_ratio,
)

SIZES = {"layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer2.0.conv1": 32}


def test_kept_counts_are_the_published_ones() -> None:
    assert [kept_count(64, r) for r in (0.1, 0.3)] == [57, 44]
    assert [kept_count(n, r) for n, r in [(16, 0.1), (32, 0.3), (32, 0.4), (16, 0.6)]] == [14, 22, 19, 6]
    assert [kept_count(n, r) for n, r in [(128, 0.3), (256, 0.3), (256, 0.4), (128, 0.6)]] == [
        89,
        179,
        153,
        51,
    ]
    assert kept_count(10, 0.9) == 1, "10 * (1 - 0.9) is 0.99... in floating point"
    assert kept_count(16, 0.999) == 1


def test_one_ratio_with_skips() -> None:
    assert widths_for_ratio(0.5, SIZES, skip=["layer1.1.*"]) == dict(zip(SIZES, (8, 16, 16), strict=True))


def test_ratio_per_layer_by_pattern_and_by_position() -> None:
    assert list(widths_for_ratio({"layer1.*": 0.25}, SIZES).values()) == [12, 12, 32]
    assert list(widths_for_ratio({"layer1.0.conv1": 0.5, "layer1.*": 0.25}, SIZES).values()) == [8, 12, 32]
    assert list(widths_for_ratio([0.5, 0.25, 0.75], SIZES).values()) == [8, 12, 8]


@pytest.mark.parametrize(
    ("ratio", "skip", "message"),
    [
        (
            {"layer9.*": 0.5},
            (),
            "pruner.ratio: layer9.* matches no prunable layer; there are: layer1.0.conv1",
        ),
        ([0.5], (), "pruner.ratio: 1 entries for 3 prunable layers"),
        (0.5, ["stem"], "pruner.skip: stem matches no prunable layer"),
    ],
)
def test_what_matches_nothing_is_refused(ratio: object, skip: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        widths_for_ratio(ratio, SIZES, skip=skip)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_floor_and_rounding() -> None:
    limits = Limits(min_channels=6, round_to=4)
    assert list(widths_for_ratio(0.9, SIZES, limits=limits).values()) == [8, 8, 8]
    assert list(widths_for_ratio(0.4, SIZES, limits=limits).values()) == [12, 12, 20]
    assert Limits(round_to=24).apply(10, 16) == 16, "never more than there are"


def test_explicit_widths() -> None:
    assert explicit_widths([4, 5, 6], SIZES) == dict(zip(SIZES, (4, 5, 6), strict=True))
    assert list(explicit_widths({"layer2.*": 3}, SIZES).values()) == [16, 16, 3]
    with pytest.raises(UserError, match=r"pruner\.widths: layer2\.0\.conv1=33: must be between 1 and 32"):
        explicit_widths([4, 5, 33], SIZES)


def cost_of(widths: Mapping[str, int]) -> Cost:
    total = sum(widths.values())
    return Cost(params=total, macs=total * total)


def test_target_is_reached_within_one_percent_or_refused_with_the_nearest() -> None:
    wide = {f"conv{i}": 1000 for i in range(3)}

    def solve(target: float, quantity: str, sizes: dict[str, int]) -> dict[str, int]:
        return WantedCost(quantity, target, cost_of(sizes)).find_widths(lambda r: widths_for_ratio(r, sizes), cost_of)

    assert abs(cost_of(solve(1234, "params", wide)).params - 1234) <= 12
    assert abs(cost_of(solve(0.25, "macs", wide)).macs - 2_250_000) <= 22_500
    narrow = {"conv": 4}
    assert solve(0.75, "params", narrow) == {"conv": 3}
    with pytest.raises(UserError, match=r"target_params=0\.6: cannot be reached within 1%.*the nearest is 2 \(of 4"):
        solve(0.6, "params", narrow)


def test_what_scores_decide_may_miss_a_target_and_says_so() -> None:
    narrow = {"conv": 4}
    wanted = WantedCost("params", 0.6, cost_of(narrow))
    widths = wanted.find_widths(lambda r: widths_for_ratio(r, narrow), cost_of, strict=False)
    assert widths == {"conv": 2}
    said = wanted.describe_miss(cost_of(widths))
    assert said == ["pruner.target_params=0.6: the nearest these scores allow is 2 of 4"]
    assert WantedCost("params", 0.5, cost_of(narrow)).describe_miss(cost_of(widths)) == []


def test_ties_keep_the_lower_index() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])}
    assert drop_lowest(scores, {"a": 3}) == {"a": [2, 4]}
    assert drop_lowest(scores, {"a": 1}) == {"a": [0, 2, 3, 4]}


# ---- one threshold for all layers ------------------------------------------------------------------------

# In ascending order: b1 a2 b0 a0 b3 a1 b2 a3.
SCORES = {"a": torch.tensor([0.4, 0.6, 0.2, 0.8]), "b": torch.tensor([0.3, 0.1, 0.7, 0.5])}


@pytest.mark.parametrize(
    ("ratio", "index"), [(0.01, 0), (0.124, 0), (0.125, 1), (0.5, 4), (0.99, 7), (1.0, 7)], ids=str
)
def test_threshold_is_the_value_at_the_truncated_index(ratio: float, index: int) -> None:
    assert global_threshold(SCORES.values(), ratio) == torch.tensor((index + 1) / 10)


def test_threshold_ranks_values_of_any_shape() -> None:
    values = [torch.arange(6.0).view(1, 2, 3).neg(), torch.tensor(2.0), torch.tensor([[5.0], [-7.0]])]
    assert global_threshold(values, 0.5) == -2, "the fifth of -7 -5 -4 -3 -2 -1 0 2 5"


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.7])
def test_what_is_not_above_the_threshold_goes(ratio: float) -> None:
    widths, emptied = widths_for_global_ratio(ratio, SCORES)
    gone = int(8 * ratio) + 1
    assert sum(widths.values()) == 8 - gone
    order = ["b", "a", "b", "a", "b", "a", "b", "a"]
    assert widths == {layer: 4 - order[:gone].count(layer) for layer in "ab"}
    assert emptied == []


def test_no_ratio_keeps_everything() -> None:
    assert widths_for_global_ratio(0.0, SCORES, limits=Limits(round_to=3)) == ({"a": 4, "b": 4}, [])


def test_the_whole_as_ratio_keeps_the_best_of_each_layer() -> None:
    assert widths_for_global_ratio(1.0, SCORES) == ({"a": 1, "b": 1}, ["a", "b"])


def test_equal_scores_fall_together() -> None:
    tied = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]), "b": torch.tensor([1.0, 3.0])}
    assert widths_for_global_ratio(0.2, tied) == ({"a": 1, "b": 1}, [])
    assert widths_for_global_ratio(0.2, {"a": torch.ones(3), "b": torch.tensor([2.0])}) == ({"a": 1, "b": 1}, ["a"])


def test_skipped_layers_neither_count_nor_shrink() -> None:
    scores = {"low": torch.full((100,), 0.01), **SCORES}
    assert widths_for_global_ratio(0.5, scores, skip=["low"]) == ({"low": 100, "a": 2, "b": 1}, [])
    assert widths_for_global_ratio(0.5, scores) == ({"low": 1, "a": 4, "b": 4}, ["low"])
    assert widths_for_global_ratio(0.5, SCORES, skip=["[ab]"]) == ({"a": 4, "b": 4}, [])
    with pytest.raises(UserError, match=r"pruner\.skip: c matches no prunable layer; there are: a, b"):
        widths_for_global_ratio(0.5, SCORES, skip=["c"])


def test_limits_hold_for_ranked_layers_only() -> None:
    scores = {"odd": torch.ones(5), **SCORES}
    limits = Limits(min_channels=2, round_to=2)
    assert widths_for_global_ratio(0.7, scores, skip=["odd"], limits=limits) == ({"odd": 5, "a": 2, "b": 2}, [])
    # Emptied is what the threshold leaves nothing of, whatever the limits then keep.
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0])}
    assert widths_for_global_ratio(0.5, scores, limits=Limits(min_channels=2)) == ({"a": 2, "b": 2}, ["a"])


def test_order_of_layers_is_kept() -> None:
    scores = {"z": torch.tensor([1.0, 2.0]), "a": torch.tensor([3.0, 4.0]), "m": torch.tensor([5.0, 6.0])}
    assert list(widths_for_global_ratio(0.3, scores, skip=["a"])[0]) == ["z", "a", "m"]


def test_target_is_met_by_one_threshold_over_all_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {f"conv{i}": torch.rand(1000, generator=generator) * (i + 1) for i in range(3)}
    full = cost_of({layer: 1000 for layer in scores})
    widths = WantedCost("params", 0.5, full).find_widths(lambda r: widths_for_global_ratio(r, scores)[0], cost_of)
    assert cost_of(widths).params == pytest.approx(1500, rel=0.01)
    threshold = global_threshold(scores.values(), 0.5)
    assert list(widths.values()) == pytest.approx([int((s > threshold).sum()) for s in scores.values()], abs=15)
    assert widths["conv0"] < widths["conv1"] < widths["conv2"], "the smaller the scores, the more goes"
