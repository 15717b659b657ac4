"""Targets become widths, scores become drops."""

from __future__ import annotations

import pytest
import torch

from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.pruning.selection import (
    Limits,
    drop_lowest,
    explicit_widths,
    kept_count,
    widths_for_ratio,
    widths_for_target,
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


def cost_of(widths: dict[str, int]) -> Cost:
    total = sum(widths.values())
    return Cost(params=total, macs=total * total)


def test_target_is_reached_within_one_percent_or_refused_with_the_nearest() -> None:
    wide = {f"conv{i}": 1000 for i in range(3)}

    def solve(target: float, quantity: str, sizes: dict[str, int]) -> dict[str, int]:
        return widths_for_target(target, quantity, lambda r: widths_for_ratio(r, sizes), cost_of, cost_of(sizes))

    assert abs(cost_of(solve(1234, "params", wide)).params - 1234) <= 12
    assert abs(cost_of(solve(0.25, "macs", wide)).macs - 2_250_000) <= 22_500
    narrow = {"conv": 4}
    assert solve(0.75, "params", narrow) == {"conv": 3}
    with pytest.raises(UserError, match=r"target_params=0\.6: cannot be reached within 1%.*the nearest is 2 \(of 4"):
        solve(0.6, "params", narrow)


def test_ties_keep_the_lower_index() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])}
    assert drop_lowest(scores, {"a": 3}) == {"a": [2, 4]}
    assert drop_lowest(scores, {"a": 1}) == {"a": [0, 2, 3, 4]}
