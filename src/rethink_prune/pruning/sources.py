"""What other studies' pruned networks keep: read from stages, runs and reports, and averaged over layer stages.

A *layer stage* is the layers at one spatial size. A source counts as much as any other, whatever its number of layers.
"""

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.cost import output_sizes
from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE
from rethink_prune.models import build_model
from rethink_prune.store.stage import Stage
from rethink_prune.surgery.architecture import Architecture, Masks, selecting_module

_OPTION = "pruner.sources"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)
_GIVE = "give prune stages, runs, or the results.json of a report"


@dataclass(frozen=True)
class Layer:
    """A layer that a pruner may touch.

    Attributes
    ----------
    name : str
        That of its group of channels, or of the layer itself where single weights go.
    size : int
        Positions of its output in one image.
    full : int
        Its channels or weights.
    kernel : tuple of int
        Of its weights; empty for channels.
    """

    name: str
    size: int
    full: int
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """A pruned network.

    Attributes
    ----------
    where : str
        Its file or folder, for messages.
    network : str
    shares : mapping of Layer to torch.Tensor
        What each layer keeps: one number, or one for each position of its kernels, in the kernel's shape. In float64.
    masked : bool
        Whether single weights are gone.
    linear : bool
        Whether linear layers took part.
    selecting : {"norm", "conv"}, optional
        Which modules select from inputs of blocks that stay whole, if some do.
    """

    where: str
    network: str
    shares: Mapping[Layer, torch.Tensor]
    masked: bool
    linear: bool = False
    selecting: Literal["norm", "conv"] | None = None


def layer_size(sizes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Return the positions of a layer, given the sizes of modules; `name` may be that of a group of its channels.

    Examples
    --------
    >>> layer_size({"conv1": (8, 8)}, "conv1#2"), layer_size({"bn1": (4, 4), "fc": ()}, "bn1.selected")
    (64, 16)
    """
    return math.prod(sizes[_module_of(name)])


def _module_of(name: str) -> str:
    plain = name.partition("#")[0]
    return selecting_module(plain) or plain


@dataclass(frozen=True)
class Averages:
    """What sources keep on average.

    Attributes
    ----------
    by_stage : bool
        Whether the average is that of a layer stage; otherwise that of each layer.
    stages : int
        How many layer stages there are; 0 where layers are matched.
    shares : mapping of Hashable to torch.Tensor
        By the stage's index, the largest size first, and the kernel's shape; or by the layer's name.
    """

    by_stage: bool
    stages: int
    shares: Mapping[Hashable, torch.Tensor]

    def of(self, layers: Sequence[Layer], network: str) -> dict[str, torch.Tensor]:
        """Return the average for each of these layers, the layers of one network.

        Raises
        ------
        UserError
            If the network has other layer stages, other kernels or, matched by layer, other layers.
        """
        order = _stage_order(layers)
        if self.by_stage and len(order) != self.stages:
            raise UserError(
                f"{_OPTION}: the sources have {self.stages} layer stages and {network} has {len(order)}: a stage is "
                "the layers at one spatial size; take sources with as many"
            )
        found = {}
        for layer in layers:
            key = (order[layer.size], layer.kernel) if self.by_stage else layer.name
            if key not in self.shares:
                kernel = " x ".join(map(str, layer.kernel))
                what = f"kernels of {kernel} in that layer stage" if self.by_stage else "such layer"
                raise UserError(f"{_OPTION}: no source has {what}: {layer.name} of {network} has no counterpart")
            found[layer.name] = self.shares[key]
        return found

    def plain(self) -> list[Any]:
        """Return the averages as plain values."""
        # Rounded: the order of the sources decides the last digit.
        return [[_words(key), share.round(decimals=12).tolist()] for key, share in sorted(self.shares.items(), key=str)]


def average(sources: Sequence[Source], *, by_stage: bool) -> Averages:
    """Average what sources keep: over the layers of a layer stage, then over the sources.

    Parameters
    ----------
    sources : sequence of Source
    by_stage : bool
        False: over the sources alone, layer by layer.

    Raises
    ------
    UserError
        If they have different numbers of layer stages, or, layer by layer, different layers.

    Examples
    --------
    >>> layers = [Layer("a", 64, 8), Layer("b", 64, 8), Layer("c", 16, 16)]
    >>> kept = [torch.tensor(share) for share in (0.5, 0.75, 0.25)]
    >>> average([Source("run", "net", dict(zip(layers, kept)), masked=False)], by_stage=True).shares
    {(0, ()): tensor(0.6250), (1, ()): tensor(0.2500)}
    """
    first = sources[0]
    found: dict[Hashable, list[torch.Tensor]] = defaultdict(list)
    for source in sources:
        if source.masked != first.masked:
            raise UserError(f"{_OPTION}: {first.where} and {source.where}: one has lost channels, the other weights")
        order = _stage_order(source.shares)
        if by_stage and len(order) != len(_stage_order(first.shares)):
            raise UserError(
                f"{_OPTION}: {source.where} has {len(order)} layer stages and {first.where} "
                f"{len(_stage_order(first.shares))}: a stage is the layers at one spatial size"
            )
        if not by_stage and _without_sizes(source.shares) != _without_sizes(first.shares):
            raise UserError(
                f"{_OPTION}: {source.where} ({source.network}) has other layers than {first.where} ({first.network}); "
                "pruner.match=layer takes sources of one network, pruner.match=stage takes any"
            )
        of_source: dict[Hashable, list[torch.Tensor]] = defaultdict(list)
        for layer, share in source.shares.items():
            of_source[(order[layer.size], layer.kernel) if by_stage else layer.name].append(share)
        for key, shares in of_source.items():
            found[key].append(torch.stack(shares).mean(0))
    averaged = {key: torch.stack(shares).mean(0) for key, shares in found.items()}
    return Averages(by_stage, len(_stage_order(first.shares)) if by_stage else 0, averaged)


def _words(key: Hashable) -> str:
    """Return the name of an average: a layer's, or that of a layer stage with the size of its kernels."""
    if isinstance(key, str):
        return key
    stage, kernel = cast(tuple[int, tuple[int, ...]], key)
    return ", ".join((f"stage {stage + 1}", *([" x ".join(map(str, kernel))] if kernel else [])))


def _stage_order(layers: Iterable[Layer]) -> dict[int, int]:
    """Return the index of each layer stage by its spatial size: the largest comes first."""
    return {size: index for index, size in enumerate(sorted({layer.size for layer in layers}, reverse=True))}


def _without_sizes(layers: Iterable[Layer]) -> set[tuple[str, int]]:
    return {(layer.name, layer.full) for layer in layers}


@dataclass
class SourceReader:
    """Reads sources.

    Parameters
    ----------
    network, model
        The study's own network: a source of a user's network is read only if it is of that one, since a stage never
        says what to import.
    """

    network: str
    model: nn.Module
    _found: dict[str, Source] = field(default_factory=dict)

    def read(self, places: Sequence[str]) -> tuple[Source, ...]:
        """Return the sources in the given places, each once.

        Parameters
        ----------
        places : sequence of str
            Prune stages, run folders, folders that hold some at any depth, or ``results.json`` of reports.

        Raises
        ------
        UserError
            If one is missing, damaged or not pruned.
        """
        for place in map(Path, places):
            if not place.exists():
                raise UserError(f"{_OPTION}: {place}: no such folder or file; {_GIVE}")
            if place.is_file():
                self._read_report(place)
            elif (place / "status.json").is_file():
                self._read_stage(Stage(place.resolve()), str(place))
            else:
                summaries = sorted(place.rglob(SUMMARY_FILE))
                if not summaries:
                    raise UserError(f"{_OPTION}: {place}: holds no stage and no run; {_GIVE}")
                for path in summaries:
                    self._read_run(_content(path), str(path.parent), path.parent.resolve().as_posix())
        return tuple(self._found.values())

    def _read_report(self, path: Path) -> None:
        content = _content(path)
        runs = content.get("runs")
        if not isinstance(runs, list) or not runs:
            raise UserError(f"{_OPTION}: {path}: is no results.json of a report, or holds no run; {_GIVE}")
        for number, run in enumerate(runs):
            where = f"{path}, run {run.get('name', number) if isinstance(run, dict) else number}"
            self._read_run(run, where, f"{path.resolve()}#{number}")

    def _read_run(self, run: Any, where: str, identity: str) -> None:
        """Read a run: from its prune stage if that is there, otherwise from what its summary says."""
        try:
            pruned, network = run["pruned"], run["study"]["settings"]["model"]
            layers = [(layer["layer"], layer["kept"], layer["full"]) for layer in pruned["layers"]]
            stage = Stage(Path(pruned["stage"])) if pruned.get("stage") else None
            others = [Path(arm["stage"]) for arm in run.get("arms", {}).values() if arm.get("stage")]
        except _DAMAGED:
            raise UserError(f"{_OPTION}: {where}: is damaged, or not finished: it says nothing about pruning") from None
        if stage is not None and stage.folder.is_dir():
            self._read_stage(stage, where)
            return
        # An architecture that was known before any training has no prune stage, but its arms have its masks.
        masked = next((folder for folder in others if (folder / "architecture.json").is_file()), None)
        masks = Architecture.load(masked).masks if masked else {}
        self._add(stage.name if stage else identity, where, network, layers, masks)

    def _read_stage(self, stage: Stage, where: str) -> None:
        try:
            result = stage.finished()
            architecture = Architecture.load(stage.folder)
        except UserError as error:
            raise UserError(f"{_OPTION}: {error}") from None
        if "report" not in result:
            raise UserError(f"{_OPTION}: {where}: is no prune stage; {_GIVE}")
        try:
            layers = [(layer["layer"], layer["kept"], layer["full"]) for layer in result["report"]["layers"]]
            network = stage.config()["network"]
        except _DAMAGED:
            raise UserError(f"{_OPTION}: {where}: is damaged: it does not say what it kept") from None
        if architecture.removed:
            raise UserError(f"{_OPTION}: {where}: has lost whole blocks, of which there is no width to average")
        self._add(stage.name, where, network, layers, architecture.masks)

    def _add(self, identity: str, where: str, network: Any, kept: Sequence[tuple[str, int, int]], masks: Masks) -> None:
        """Add what a network keeps of its layers: name, kept and full width of each."""
        if identity in self._found:
            return
        try:
            name = str(network["name"])
            model = self._build(network, name, where)
            sizes = output_sizes(model, (network["in_channels"], *[network["image_size"]] * 2))
            weights = {n: model.get_parameter(f"{_module_of(n)}.weight") for n, _, _ in kept if not selecting_module(n)}
            if not kept or not all(0 <= count <= full for _, count, full in kept):
                raise ValueError(kept)
        except _DAMAGED:
            raise UserError(f"{_OPTION}: {where}: is damaged: its layers are not those of its network") from None
        if any(count == 0 for _, count, _ in kept):
            raise UserError(f"{_OPTION}: {where}: has lost whole blocks, of which there is no width to average")
        if all(count == full for _, count, full in kept):
            raise UserError(f"{_OPTION}: {where}: is not pruned: every layer is whole")
        # Not by the masks: those of whole filters are masks, too.
        totals = {n: full for n, _, full in kept}
        by_weight = any(totals[n] == weight.numel() > len(weight) for n, weight in weights.items())
        if by_weight:
            shares = self._mask_shares(where, kept, masks, sizes, weights)
        else:
            shares = {
                Layer(n, layer_size(sizes, n), full): torch.tensor(count / full, dtype=torch.float64)
                for n, count, full in kept
            }
        self._found[identity] = Source(
            where,
            name,
            shares,
            masked=by_weight,
            linear=any(weight.ndim == 2 for weight in weights.values()),
            selecting=_selecting(model, [n for n, _, _ in kept]),
        )

    def _mask_shares(
        self,
        where: str,
        kept: Sequence[tuple[str, int, int]],
        masks: Masks,
        sizes: Mapping[str, tuple[int, ...]],
        weights: Mapping[str, torch.Tensor],
    ) -> dict[Layer, torch.Tensor]:
        """Return the share of a layer's kernels that keeps each of their positions."""
        shares = {}
        for name, count, full in kept:
            mask = masks.get(f"{name}.weight")
            if mask is None:
                raise UserError(
                    f"{_OPTION}: {where}: has lost single weights, and which ones is not recorded there; "
                    "give its prune stage, or the run with its store"
                )
            if mask.shape != weights[name].shape or int(mask.sum()) != count:
                raise UserError(f"{_OPTION}: {where}: is damaged: the mask of {name} is not that of its network")
            layer = Layer(name, layer_size(sizes, name), full, tuple(mask.shape[2:]))
            shares[layer] = mask.double().mean(dim=(0, 1))
        return shares

    def _build(self, network: Mapping[str, Any], name: str, where: str) -> nn.Module:
        """Return the unpruned network of a source; its weights do not matter."""
        if ":" not in name:
            classes, channels = network["num_classes"], network["in_channels"]
            try:
                with torch.device("meta"):
                    return build_model(name, num_classes=classes, in_channels=channels, **network["options"])
            except UserError as error:
                raise UserError(f"{_OPTION}: {where}: {error}") from None
        if name == self.network:
            return self.model
        raise UserError(
            f"{_OPTION}: {where}: is of {name}, a network of your own, so its layer stages can be told only in a study "
            f"of that network; this one is of {self.network}"
        )


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{_OPTION}: {path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{_OPTION}: {path}: is damaged, or of another kind; {_GIVE}")
    return content


def _selecting(model: nn.Module, names: Iterable[str]) -> Literal["norm", "conv"] | None:
    """Return which modules select what they read, if some do."""
    found = [model.get_submodule(module) for name in names if (module := selecting_module(name))]
    return None if not found else "norm" if isinstance(found[0], _BatchNorm) else "conv"


def ordered_positions(shares: torch.Tensor) -> Iterator[int]:
    """Yield the positions of a kernel, that which is kept most often first; of equal ones, the first.

    Examples
    --------
    >>> list(ordered_positions(torch.tensor([[0.1, 0.9], [0.9, 0.2]])))
    [1, 2, 3, 0]
    """
    yield from torch.sort(shares.flatten(), descending=True, stable=True).indices.tolist()
