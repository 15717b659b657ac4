"""Pruning in rounds: each removes a share of what the one before left, and the network is trained in between.

Two forms (Frankle and Carbin 2019, arXiv:1803.03635; Renda et al. 2020, arXiv:2003.02389):

``pruner.share_per_round``
    Every round removes that share of what is left. The first rounds of two studies are then the same stages, whatever
    the number of rounds.
target
    The rounds reach the pruner's target (``ratio``, ``widths``, ...) in equal shares: after round ``r`` of ``R``, a
    layer that is to keep ``K`` of ``N`` channels keeps ``int(N * (K / N) ** (r / R))``, and ``K`` after the last. Where
    scores decide the widths, every round removes ``1 - (1 - ratio) ** (1 / R)`` of what is left, so the last one is off
    by at most a unit a round.

A pruner does not know about rounds: in each, it gets options of its own and the network as it was left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.pruner import Pruner, Target

AnyPruner = Pruner[Any, Any]


@dataclass(frozen=True)
class Rounds:
    """The rounds of a study.

    Attributes
    ----------
    target : Target
        What is gone from the unpruned network after the last.
    pruners : tuple of Pruner
        One for each round, with the options for what the round before left.
    targets : tuple of Target
        What is gone from the unpruned network after each, where the options decide it; empty otherwise.
    """

    target: Target
    pruners: tuple[AnyPruner, ...]
    targets: tuple[Target, ...] = ()


def plan_rounds(pruner: AnyPruner, model: nn.Module, example: torch.Tensor, network: str) -> Rounds:
    """Return the rounds in which a pruner prunes a network; a single one if its options ask for no more.

    Parameters
    ----------
    pruner : Pruner
    model : torch.nn.Module
        The unpruned network; left as it is.
    example : torch.Tensor
        One batch of its input.
    network : str
        Its name, for messages and to look up variants.

    Raises
    ------
    UserError
        If the options do not fit the network, or the pruner cannot prune in rounds.

    Examples
    --------
    >>> from rethink_prune.config import ChannelOptions
    >>> from rethink_prune.pruning.l1 import L1
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3))
    >>> l1 = L1(ChannelOptions(name="l1", ratio=0.75, rounds=2))
    >>> [step.options.widths for step in plan_rounds(l1, model, torch.zeros(1, 3, 8, 8), "small").pruners]
    [{'0': 32}, {'0': 16}]
    """
    options = pruner.options
    count = options.rounds
    if count is None:
        target = pruner.target(model, example, network)
        return Rounds(target, (pruner,), (target,) if target.known else ())
    where = f"pruner.rounds={count}"
    if not pruner.in_rounds or pruner.trains_sparse:
        why = pruner.no_rounds if not pruner.in_rounds else "it trains the unpruned network its own way"
        raise UserError(f"{where}: {options.name} cannot prune in rounds: {why}")
    share = options.share_per_round
    if getattr(options, "min_share", 0) and (share is not None or not _decides_widths(options)):
        raise UserError(f"{where}: pruner.min_share is a share of the unpruned layer, which a round does not know")

    def with_options(**changes: Any) -> AnyPruner:
        return type(pruner)(options.model_copy(update={"rounds": None, "share_per_round": None, **changes}))

    # After the first round where a share is given, and after the last where a target is.
    target = with_options(**({} if share is None else {"ratio": share})).target(model, example, network)
    if share is not None:
        _check_share(f"{where} pruner.share_per_round={share:g}", share, count, target)
    # Where the options decide the widths, each round is told them.
    if isinstance(target, ChannelTarget) and target.widths is not None:
        steps = _widths_by_target(target, count) if share is None else _widths_by_share(target, share, count)
        _check_each_removes(where, target.sizes, steps)
        unbounded: dict[str, Any] = {
            "ratio": None,
            "variant": None,
            "target_macs": None,
            "target_params": None,
            "skip": (),
        }
        unbounded |= {"min_channels": 1, "round_to": 1, "min_share": 0.0}
        pruners = tuple(with_options(**unbounded, widths=widths) for widths in steps)
        targets = tuple(step.target(model, example, network) for step in pruners)
        return Rounds(targets[-1], pruners, targets)
    if share is None:
        if options.ratio is None:
            raise UserError(f"{where}: {options.name} needs pruner.ratio or pruner.share_per_round here")
        share = _share_of(options.ratio, count)
    else:
        target = with_options(ratio=1 - (1 - share) ** count).target(model, example, network)
    return Rounds(target, (with_options(ratio=share),) * count)


def _decides_widths(options: Any) -> bool:
    return bool(getattr(options, "decides_widths", False))


def _share_of(ratio: Any, count: int) -> Any:
    """Return the share of what is left that goes in each of so many rounds."""
    if isinstance(ratio, Mapping):
        return {name: _share_of(value, count) for name, value in ratio.items()}
    if isinstance(ratio, list):
        return [_share_of(value, count) for value in ratio]
    return 1 - (1 - ratio) ** (1 / count)


def _widths_by_target(target: ChannelTarget, count: int) -> list[dict[str, int]]:
    assert target.widths is not None
    kept = target.widths
    steps = [
        {name: max(kept[name], int(size * (kept[name] / size) ** (step / count) + 1e-9)) for name, size in sizes}
        for sizes in [target.sizes.items()]
        for step in range(1, count)
    ]
    return [*steps, dict(kept)]


def _widths_by_share(first: ChannelTarget, share: float, count: int) -> list[dict[str, int]]:
    steps: list[dict[str, int]] = []
    for _ in range(count):
        steps.append(first.widths_for_ratio(share, steps[-1] if steps else first.sizes))
    return steps


def _check_each_removes(where: str, sizes: Mapping[str, int], steps: list[dict[str, int]]) -> None:
    for number, (before, after) in enumerate(zip([sizes, *steps], steps, strict=False), 1):
        if before == after:
            raise UserError(f"{where}: round {number} would remove nothing; take fewer rounds or a larger share")


def _check_share(where: str, share: float, count: int, first: Target) -> None:
    """Raise `UserError` if rounds of this share would leave less than one unit of all."""
    total = sum(layer.full for layer in first.report().layers)
    left = total * (1 - share) ** count
    if left < 1:
        raise UserError(f"{where}: leaves nothing: {left:.2g} of {total:,} after the last round; take less")
