"""How many channels each layer keeps, by a ratio, by widths or by a cost; and which ones, by scores.

All functions know layers by name alone, so they serve channels and single weights alike.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

import torch

from rethink_prune.config import TargetOptions
from rethink_prune.cost import Cost
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Target

PerLayer = float | Sequence[float] | Mapping[str, float]

TOLERANCE = 0.01
# A layer of which a ranking over all leaves a smaller share is named.
THIN = 0.1
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
    """Bounds on every width: at least `min_channels` and a share of `min_share`; rounded up to a multiple.

    Examples
    --------
    >>> Limits(min_share=0.1).apply(1, 64)
    7
    """

    min_channels: int = 1
    round_to: int = 1
    min_share: float = 0.0

    def apply(self, kept: int, size: int) -> int:
        """Return the width nearest to `kept` from above that respects the bounds and `size`."""
        # Rounds up in whole numbers: the ceiling of a quotient is minus the floor of its opposite.
        least = max(kept, self.min_channels, math.ceil(self.min_share * size - 1e-9))
        multiple = -(-least // self.round_to) * self.round_to
        return min(size, multiple)


def widths_for_ratio(
    ratio: PerLayer,
    sizes: Mapping[str, int],
    *,
    skip: Collection[str] = (),
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
    skip : collection of str
        Names or patterns of layers to leave whole.
    limits : Limits
        Not applied to layers that are left whole.
    kept : callable
        Gives the width for a full width and a ratio.

    Raises
    ------
    UserError
        If a pattern matches no layer or a sequence has the wrong length.

    Examples
    --------
    >>> widths_for_ratio({"conv*": 0.25}, {"conv1": 8, "conv2": 16, "fc": 10}, skip=["conv2"])
    {'conv1': 6, 'conv2': 16, 'fc': 10}
    """
    ratios = _ratios_of_pruned(ratio, sizes, skip)
    return {
        layer: limits.apply(kept(size, ratios[layer]), size) if layer in ratios else size
        for layer, size in sizes.items()
    }


def layers_out_of_reach(ratio: PerLayer, sizes: Mapping[str, int], *, skip: Collection[str] = ()) -> list[str]:
    """Return the layers of which a ratio would leave less than one channel, so that they keep more than it says.

    Examples
    --------
    >>> layers_out_of_reach(0.9, {"conv1": 4, "conv2": 16})
    ['conv1']
    """
    ratios = _ratios_of_pruned(ratio, sizes, skip)
    # The constant of `kept_count`.
    return [layer for layer, share in ratios.items() if sizes[layer] * (1 - share) + 1e-9 < 1]


def widths_for_global_ratio(
    ratio: float, scores: Mapping[str, torch.Tensor], *, skip: Collection[str] = (), limits: Limits = Limits()
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
    skip : collection of str
        Names or patterns of layers to leave whole.
    limits : Limits
        Each layer keeps its best units up to these bounds, and at least one.

    Returns
    -------
    widths : dict of str to int
    emptied : list of str
        Layers with no unit above the threshold.

    Examples
    --------
    >>> widths_for_global_ratio(0.5, {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])})
    ({'a': 1, 'b': 2}, ['a'])
    """
    sizes = {layer: len(values) for layer, values in scores.items()}
    skipped = matching_layers("skip", skip, sizes)
    ranked = {layer: values for layer, values in scores.items() if layer not in skipped}
    # The rule would remove one unit even for a ratio of zero.
    if not ratio or not ranked:
        return sizes, []
    # One comparison for all, so equal scores go or stay together.
    threshold = global_threshold(ranked.values(), ratio)
    above = {layer: int((values > threshold).sum()) for layer, values in ranked.items()}
    widths = {layer: limits.apply(max(1, count), sizes[layer]) for layer, count in above.items()}
    return sizes | widths, [layer for layer, count in above.items() if not count]


def describe_thin(widths: Mapping[str, int], sizes: Mapping[str, int]) -> list[str]:
    """Return a line about layers of which a ranking over all leaves less than a tenth; nothing if there are none.

    Examples
    --------
    >>> describe_thin({"a": 1, "b": 8}, {"a": 16, "b": 16})
    ['less than 10 % of a: 1 of 16; pruner.min_share=0.1 keeps a share of every layer']
    """
    thin = [f"{name}: {width} of {sizes[name]}" for name, width in widths.items() if width < THIN * sizes[name]]
    listed = ", ".join(thin[:4]) + (f" and {len(thin) - 4} more" if len(thin) > 4 else "")
    return [f"less than 10 % of {listed}; pruner.min_share=0.1 keeps a share of every layer"] if thin else []


def describe_shortfall(
    ratio: object, widths: Mapping[str, int], sizes: Mapping[str, int], *, skip: Collection[str], limits: Limits
) -> list[str]:
    """Return a line if bounds keep clearly more than one ratio for all layers says; nothing for other ratios.

    Examples
    --------
    >>> describe_shortfall(0.9, {"a": 8, "b": 8}, {"a": 16, "b": 16}, skip=(), limits=Limits(min_share=0.5))
    ['pruner.ratio=0.9: only 50 % go, because of min_share, min_channels or round_to']
    """
    pruned = sizes.keys() - matching_layers("skip", skip, sizes)
    if not isinstance(ratio, float) or not pruned or limits == Limits():
        return []
    gone = 1 - sum(widths[name] for name in pruned) / sum(sizes[name] for name in pruned)
    if gone > ratio - TOLERANCE:
        return []
    return [f"pruner.ratio={ratio:g}: only {100 * gone:.3g} % go, because of min_share, min_channels or round_to"]


def global_threshold(values: Iterable[torch.Tensor], ratio: float) -> torch.Tensor:
    """Return the value at index ``int(n * ratio)`` of all `n` values in ascending order.

    Examples
    --------
    >>> global_threshold([torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 4.0]])], 0.5)
    tensor(3.)
    """
    ordered = torch.cat([value.flatten() for value in values]).sort().values
    return ordered[min(int(len(ordered) * ratio), len(ordered) - 1)]


def explicit_widths(widths: Sequence[int] | Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the kept width per layer from a list in network order or a mapping by name or pattern.

    Raises
    ------
    UserError
        If a width is not in [1, full width], a pattern matches no layer, or a list has the wrong length.

    Examples
    --------
    >>> explicit_widths({"conv1": 3}, {"conv1": 8, "conv2": 16})
    {'conv1': 3, 'conv2': 16}
    """
    wanted = _per_layer("widths", widths, sizes)
    for layer, width in wanted.items():
        if not 1 <= width <= sizes[layer]:
            raise UserError(f"pruner.widths: {layer}={width}: must be between 1 and {sizes[layer]}, its full width")
    return {layer: int(wanted.get(layer, size)) for layer, size in sizes.items()}


@dataclass(frozen=True)
class WantedCost:
    """How many MACs or parameters the pruned network shall have.

    Attributes
    ----------
    quantity : {"macs", "params"}
        What is counted.
    value : float
        As typed; below 1, a share of the unpruned network's.
    full : Cost
        Of the unpruned network.

    Examples
    --------
    >>> wanted = WantedCost("macs", 0.5, full=Cost(params=10, macs=100))
    >>> wanted.amount
    50.0
    >>> wanted.describe_miss(Cost(params=5, macs=60))
    ['pruner.target_macs=0.5: the nearest these scores allow is 60 of 100']
    """

    quantity: str
    value: float
    full: Cost

    @property
    def total(self) -> int:
        """What the unpruned network has."""
        return self.of(self.full)

    @property
    def amount(self) -> float:
        """What the pruned network shall have."""
        return self.value * self.total if self.value < 1 else self.value

    def on_the_way(self, progress: float) -> Self:
        """Return what is wanted after a part of the way from the unpruned network, in (0, 1], in equal factors.

        Examples
        --------
        >>> WantedCost("macs", 0.25, full=Cost(params=10, macs=100)).on_the_way(0.5).amount
        50.0
        """
        return self if progress == 1 else replace(self, value=self.total * (self.amount / self.total) ** progress)

    def of(self, cost: Cost) -> int:
        """Return what counts of a cost."""
        return int(getattr(cost, self.quantity))

    def check_reach(self, narrowest: Cost) -> None:
        """Raise `UserError` if a network with as little as possible left, of cost `narrowest`, still costs more."""
        # Only what no network can reach is refused here; what falls between two steps, by `find_widths`.
        least = self.of(narrowest)
        if least > (1 + TOLERANCE) * self.amount:
            raise UserError(
                f"pruner.target_{self.quantity}={self.value:g}: out of reach; the least that can remain is {least} of "
                f"{self.total}{_SHARES}"
            )

    def describe_miss(self, reached: Cost) -> list[str]:
        """Return a line if the cost is not within 1 % of what is wanted; else nothing."""
        found = self.of(reached)
        if abs(found - self.amount) <= TOLERANCE * self.amount:
            return []
        return [
            f"pruner.target_{self.quantity}={self.value:g}: the nearest these scores allow is {found} of {self.total}"
        ]

    def find_widths(
        self,
        widths_at: Callable[[float], dict[str, int]],
        cost_of: Callable[[Mapping[str, int]], Cost],
        *,
        strict: bool = True,
    ) -> dict[str, int]:
        """Find the one ratio for all layers at which the network has the wanted cost.

        The cost falls in steps as the ratio grows, because layers of equal width lose a channel at the same ratio.
        Bisection finds the step that holds the wanted cost. Inside the step, a second bisection decides how many
        layers, in network order, already lose their channel.

        Parameters
        ----------
        widths_at : callable
            Gives the widths for a ratio.
        cost_of : callable
            Gives the network's cost for widths.
        strict : bool
            Whether to refuse what is not within 1 %.

        Raises
        ------
        UserError
            If it is refused; names the nearest cost that can be reached.
        """
        wanted = self.amount
        # Counting a cost is slow: each set of widths is counted once, and the nearest of all is the answer.
        seen: dict[tuple[int, ...], tuple[float, dict[str, int]]] = {}

        def costs_more(widths: dict[str, int]) -> bool:
            key = tuple(widths.values())
            if key not in seen:
                seen[key] = float(self.of(cost_of(widths))), widths
            return seen[key][0] > wanted

        low, high = 0.0, 1.0
        wide, narrow = widths_at(low), widths_at(high)
        if costs_more(wide) and not costs_more(narrow):
            # Fine enough to part the steps of layers of up to 10,000 channels.
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
        if strict and abs(reached - wanted) > TOLERANCE * wanted:
            raise UserError(
                f"pruner.target_{self.quantity}={self.value:g}: cannot be reached within {TOLERANCE:.0%} by "
                f"scaling all layers alike; the nearest is {reached:.0f} (of {self.total} unpruned){_SHARES}"
            )
        return widths


def wanted_cost(options: TargetOptions, target: Target) -> WantedCost | None:
    """Return the cost that the options ask for; None if they state what goes in another way."""
    name = options.target_option
    if not name.startswith("target_"):
        return None
    return WantedCost(name.removeprefix("target_"), getattr(options, name), target.full_cost)


def drop_lowest(scores: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Return, per group, the units to drop so that the best-scored ones remain; ties keep the lower index.

    Examples
    --------
    >>> drop_lowest({"conv1": torch.tensor([2.0, 1.0, 2.0])}, {"conv1": 1})
    {'conv1': [1, 2]}
    """
    drop = {}
    for name, values in scores.items():
        # Stable, so that the choice among equal scores is the same on every machine.
        best_first = torch.sort(values, descending=True, stable=True).indices
        drop[name] = sorted(best_first[widths[name] :].tolist())
    return drop


def _ratios_of_pruned(ratio: PerLayer, sizes: Mapping[str, int], skip: Collection[str]) -> dict[str, float]:
    """Return the ratio of each layer that has one and is not skipped."""
    ratios = _per_layer("ratio", ratio, sizes)
    skipped = matching_layers("skip", skip, sizes)
    return {layer: share for layer, share in ratios.items() if layer not in skipped}


def _per_layer(option: str, values: PerLayer, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the value of each layer that has one, in network order."""
    if isinstance(values, Mapping):
        # For its errors alone: which pattern a layer takes, the first match decides.
        matching_layers(option, values, sizes)
        first = {layer: next((p for p in values if _matches(layer, p)), None) for layer in sizes}
        return {layer: values[pattern] for layer, pattern in first.items() if pattern is not None}
    if isinstance(values, Sequence):
        if len(values) != len(sizes):
            raise UserError(
                f"pruner.{option}: {len(values)} entries for {len(sizes)} prunable layers: {', '.join(sizes)}"
            )
        return dict(zip(sizes, values, strict=True))
    return dict.fromkeys(sizes, values)


def matching_layers(option: str, patterns: Collection[str], sizes: Mapping[str, int]) -> set[str]:
    """Return the layers that match any of the patterns; raise `UserError` for a pattern that matches none."""
    found = set()
    for pattern in patterns:
        layers = {layer for layer in sizes if _matches(layer, pattern)}
        if not layers:
            raise UserError(f"pruner.{option}: {pattern} matches no prunable layer; there are: {', '.join(sizes)}")
        found |= layers
    return found


def _matches(layer: str, pattern: str) -> bool:
    # A name may hold characters that a pattern reads as wildcards, such as brackets.
    return layer == pattern or fnmatchcase(layer, pattern)
