"""From a target to how many channels each group keeps, and from scores to which ones.

What every pruner that scores has in common: per-layer ratios and widths, a target for the whole network found by
bisection, rounding, and a deterministic choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from rethink_prune.cost import Cost
from rethink_prune.errors import UserError

PerLayer = float | Sequence[float] | Mapping[str, float]

TARGET_TOLERANCE = 0.01
_SHARES = "; values below 1 are shares"


def kept_count(size: int, ratio: float) -> int:
    """Return how many of `size` channels remain when `ratio` of them go: at least one.

    Rounds down, as the published widths do; the small constant undoes binary rounding (10 * (1 - 0.9) is 0.99...98).

    Examples
    --------
    >>> kept_count(64, 0.1), kept_count(10, 0.9), kept_count(16, 0.99)
    (57, 1, 1)
    """
    return max(1, int(size * (1 - ratio) + 1e-9))


@dataclass(frozen=True)
class Limits:
    """Bounds on every width: at least `min_channels`, rounded up to a multiple of `round_to`."""

    min_channels: int = 1
    round_to: int = 1

    def apply(self, kept: int, size: int) -> int:
        """Return the width nearest to `kept` from above that respects the bounds and `size`."""
        multiple = -(-max(kept, self.min_channels) // self.round_to) * self.round_to
        return min(size, multiple)


def widths_for_ratio(
    ratio: PerLayer,
    sizes: Mapping[str, int],
    *,
    skip: Sequence[str] = (),
    limits: Limits = Limits(),
    kept: Callable[[int, float], int] = kept_count,
) -> dict[str, int]:
    """Return the kept width per layer.

    Parameters
    ----------
    ratio : float, sequence of float, or mapping of str to float
        The share of channels to remove: for every layer, one per layer in order, or by layer name. Names may be
        shell patterns (``layer1.*``), the first match counts, and layers without one are left whole.
    sizes : mapping of str to int
        Full width per prunable layer, in network order.
    skip : sequence of str
        Names or patterns of layers to leave whole.
    limits : Limits
        Not applied to layers that are left whole.
    kept : callable
        Gives the width for a full width and a ratio.

    Raises
    ------
    UserError
        If a pattern matches no layer or a sequence has the wrong length.
    """
    ratios = _per_layer("ratio", ratio, sizes)
    left_whole = _matches("skip", skip, sizes)
    return {
        layer: size if layer in left_whole or layer not in ratios else limits.apply(kept(size, ratios[layer]), size)
        for layer, size in sizes.items()
    }


def layers_out_of_reach(ratio: PerLayer, sizes: Mapping[str, int], *, skip: Sequence[str] = ()) -> list[str]:
    """Return the layers of which a ratio would leave less than one channel, so that they keep more than it says."""
    ratios = _per_layer("ratio", ratio, sizes)
    left_whole = _matches("skip", skip, sizes)
    return [
        layer
        for layer, size in sizes.items()
        if layer not in left_whole and layer in ratios and size * (1 - ratios[layer]) + 1e-9 < 1
    ]


def widths_for_global_ratio(
    ratio: float, scores: Mapping[str, torch.Tensor], *, skip: Sequence[str] = (), limits: Limits = Limits()
) -> tuple[dict[str, int], list[str]]:
    """Return the kept width per layer if all units are ranked together.

    Of `n` scores in ascending order, that at index ``int(n * ratio)`` is the threshold, and what is not above it goes
    (the published rule of network slimming, Liu et al. 2017): ``int(n * ratio) + 1`` units if no scores are equal.

    Parameters
    ----------
    ratio : float
        Share of all units, those of skipped layers excepted; 0 keeps everything.
    scores : mapping of str to torch.Tensor
        Per prunable layer.
    skip : sequence of str
        Names or patterns of layers to leave whole.
    limits : Limits
        Each layer keeps its best units up to these bounds, and at least one.

    Returns
    -------
    widths : dict of str to int
    emptied : list of str
        Layers with no unit above the threshold.
    """
    sizes = {layer: len(values) for layer, values in scores.items()}
    left_whole = _matches("skip", skip, sizes)
    ranked = {layer: values for layer, values in scores.items() if layer not in left_whole}
    if not ratio or not ranked:
        return sizes, []
    threshold = global_threshold(ranked.values(), ratio)
    above = {layer: int((values > threshold).sum()) for layer, values in ranked.items()}
    widths = {layer: limits.apply(max(1, above.get(layer, size)), size) for layer, size in sizes.items()}
    return sizes | {layer: widths[layer] for layer in ranked}, [layer for layer, count in above.items() if not count]


def global_threshold(values: Iterable[torch.Tensor], ratio: float) -> torch.Tensor:
    """Return the value at index ``int(n * ratio)`` of all `n` values in ascending order."""
    ordered = torch.cat([value.flatten() for value in values]).sort().values
    return ordered[min(int(len(ordered) * ratio), len(ordered) - 1)]


def explicit_widths(widths: Sequence[int] | Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the kept width per layer from a list in network order or a mapping by name or pattern.

    Raises
    ------
    UserError
        If a width is not in [1, full width], a pattern matches no layer, or a list has the wrong length.
    """
    wanted = _per_layer("widths", widths, sizes)
    for layer, width in wanted.items():
        if not 1 <= width <= sizes[layer]:
            raise UserError(f"pruner.widths: {layer}={width}: must be between 1 and {sizes[layer]}, its full width")
    return {layer: int(wanted.get(layer, size)) for layer, size in sizes.items()}


def check_reach(target: float, quantity: str, narrowest: Cost, full: Cost) -> None:
    """Raise `UserError` if even the narrowest network there can be costs more than `target` allows.

    Parameters
    ----------
    target, quantity
        As for `widths_for_target`.
    narrowest, full : Cost
        Of the network with as little as possible left, and of the unpruned one.
    """
    least, total = getattr(narrowest, quantity), getattr(full, quantity)
    if least > (1 + TARGET_TOLERANCE) * _amount(target, total):
        raise UserError(
            f"pruner.target_{quantity}={target:g}: out of reach; the least that can remain is {least} of {total}"
            f"{_SHARES}"
        )


def widths_for_target(
    target: float,
    quantity: str,
    widths_at: Callable[[float], dict[str, int]],
    cost_of: Callable[[Mapping[str, int]], Cost],
    full: Cost,
    *,
    strict: bool = True,
) -> dict[str, int]:
    """Find the one ratio for all layers at which the network costs `target`.

    The cost falls in steps as the ratio grows, because layers of equal width lose a channel at the same ratio.
    Bisection closes in on the step that holds the target; inside it, a second bisection decides how many layers, in
    network order, already lose their channel.

    Parameters
    ----------
    target : float
        MACs or parameters; a value below 1 is a share of the full network's.
    quantity : {"macs", "params"}
        What `target` counts.
    widths_at : callable
        Gives the widths for a ratio.
    cost_of : callable
        Gives the network's cost for widths.
    full : Cost
        Cost of the unpruned network.
    strict : bool
        Whether to refuse what is not within 1 % of the target.

    Raises
    ------
    UserError
        If it is refused; names the nearest cost that can be reached.
    """
    total = getattr(full, quantity)
    wanted = _amount(target, total)
    seen: dict[tuple[int, ...], tuple[float, dict[str, int]]] = {}

    def costs_more(widths: dict[str, int]) -> bool:
        key = tuple(widths.values())
        if key not in seen:
            seen[key] = float(getattr(cost_of(widths), quantity)), widths
        return seen[key][0] > wanted

    low, high = 0.0, 1.0
    wide, narrow = widths_at(low), widths_at(high)
    if costs_more(wide) and not costs_more(narrow):
        while high - low > 1e-4:
            middle = (low + high) / 2
            if costs_more(widths_at(middle)):
                low, wide = middle, widths_at(middle)
            else:
                high, narrow = middle, widths_at(middle)
        layers = list(wide)
        first, last = 0, len(layers)
        while last - first > 1:
            count = (first + last) // 2
            if costs_more({layer: (narrow if i < count else wide)[layer] for i, layer in enumerate(layers)}):
                first = count
            else:
                last = count
    reached, widths = min(seen.values(), key=lambda entry: abs(entry[0] - wanted))
    if strict and abs(reached - wanted) > TARGET_TOLERANCE * wanted:
        raise UserError(
            f"pruner.target_{quantity}={target:g}: cannot be reached within {TARGET_TOLERANCE:.0%} by one ratio for "
            f"all layers; the nearest is {reached:.0f} (of {total} unpruned){_SHARES}"
        )
    return widths


def _amount(target: float, total: int) -> float:
    return target * total if target < 1 else target


def missed_target(target: float, quantity: str, reached: Cost, full: Cost) -> list[str]:
    """Return what to say about a cost that is not within 1 % of its target: a line, or nothing."""
    total, found = getattr(full, quantity), getattr(reached, quantity)
    wanted = _amount(target, total)
    if abs(found - wanted) <= TARGET_TOLERANCE * wanted:
        return []
    return [f"pruner.target_{quantity}={target:g}: the nearest these scores allow is {found} of {total}"]


def drop_lowest(scores: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Return, per group, the units to drop so that the best-scored ones remain; ties keep the lower index."""
    drop = {}
    for name, values in scores.items():
        best_first = torch.sort(values, descending=True, stable=True).indices
        drop[name] = sorted(best_first[widths[name] :].tolist())
    return drop


def _per_layer(
    option: str, values: float | Sequence[float] | Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, float]:
    if isinstance(values, Mapping):
        _matches(option, values, sizes)
        first = {layer: next((p for p in values if _match(layer, p)), None) for layer in sizes}
        return {layer: values[pattern] for layer, pattern in first.items() if pattern is not None}
    if isinstance(values, Sequence):
        if len(values) != len(sizes):
            raise UserError(
                f"pruner.{option}: {len(values)} entries for {len(sizes)} prunable layers: {', '.join(sizes)}"
            )
        return dict(zip(sizes, values, strict=True))
    return dict.fromkeys(sizes, values)


def _matches(option: str, patterns: Sequence[str] | Mapping[str, float], sizes: Mapping[str, int]) -> set[str]:
    found = set()
    for pattern in patterns:
        layers = {layer for layer in sizes if _match(layer, pattern)}
        if not layers:
            raise UserError(f"pruner.{option}: {pattern} matches no prunable layer; there are: {', '.join(sizes)}")
        found |= layers
    return found


def _match(layer: str, pattern: str) -> bool:
    return layer == pattern or fnmatchcase(layer, pattern)
