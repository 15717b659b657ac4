"""What pruning leaves, as patterns: kept widths by layer and by layer stage, and kept positions of kernels.

A *layer stage* is the layers at one spatial size, that of their outputs. Averages over one are those that ``guided``
pruning takes: each layer counts the same, each seed counts the same.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from rethink_prune.errors import UserError
from rethink_prune.report.groups import RunGroup
from rethink_prune.report.records import KernelRecord, RunRecord
from rethink_prune.report.statistics import SeedStatistics, describe_seeds

# Of an output, in pixels.
Size = tuple[int, ...]
Sizes = Mapping[str, Size]
_NOT_KNOWN = "layer stages are not known"


@dataclass(frozen=True)
class KeptWidth:
    """A layer's width: in full, and the mean and standard deviation over `n` seeds of what is kept.

    `size` is that of its output, such as ``16 x 16``; empty where it is not known.
    """

    layer: str
    kept: float
    full: int
    sd: float | None
    n: int
    size: str = ""


@dataclass(frozen=True)
class LayerStage:
    """The layers at one spatial size.

    Attributes
    ----------
    size
        Of their outputs, such as ``16 x 16``.
    layers
        How many there are.
    full
        Their mean width in full.
    width, share
        What is kept, averaged over the layers: of channels, single weights or blocks, and in percent.
    """

    size: str
    layers: int
    full: float
    width: SeedStatistics
    share: SeedStatistics


@dataclass(frozen=True)
class KernelPattern:
    """Which positions the kernels of a layer stage keep.

    Attributes
    ----------
    size
        Of the layers' outputs; empty where it is not known: then these are all layers with such kernels.
    layers, n
        How many layers and seeds.
    kept
        For each position the share of kernels that keep it, averaged over layers and seeds.
    """

    size: str
    layers: int
    n: int
    kept: tuple[tuple[float, ...], ...]

    @property
    def kernel(self) -> str:
        """The size of the kernels, such as ``3 x 3``."""
        return f"{len(self.kept)} x {len(self.kept[0])}"


@dataclass(frozen=True)
class RowPattern:
    """What pruning leaves in one row, over its seeds; `unknown` says why layer stages are not known."""

    slug: str
    network: str
    pruned_by: str
    widths: tuple[KeptWidth, ...]
    stages: tuple[LayerStage, ...]
    kernels: tuple[KernelPattern, ...]
    unknown: str

    @property
    def title(self) -> str:
        """Name of the row in a sentence."""
        return f"{self.network}, {self.pruned_by}"


def row_pattern(group: RunGroup, number: int, factory: Callable[..., Any] | None = None) -> RowPattern:
    """Return what pruning leaves in a group's runs.

    Parameters
    ----------
    number
        Of the row, for file names.
    factory
        Builds the unpruned network if it is one of the user's own; without it, its layer stages are not known.
    """
    widths, kernels = tuple(_mean_widths(group.runs)), [run.pruned.kernels for run in group.runs if run.pruned]
    names = [w.layer for w in widths] + [kernel.layer for found in kernels for kernel in found]
    sizes, unknown = _layer_sizes(group, names, factory) if names else ({}, "")
    return RowPattern(
        group.slug(number),
        group.study.model,
        group.pruned_by,
        tuple(replace(width, size=size_name(sizes.get(width.layer))) for width in widths),
        tuple(_stages(group.runs, sizes)),
        tuple(_kernel_patterns([found for found in kernels if found], sizes)),
        unknown,
    )


def size_name(size: Size | None) -> str:
    """Return a spatial size in words; a linear layer has one position.

    Examples
    --------
    >>> size_name((16, 16)), size_name(()), size_name(None)
    ('16 x 16', '1 x 1', '')
    """
    return "" if size is None else " x ".join(map(str, size or (1, 1)))


def _mean_widths(runs: Sequence[RunRecord]) -> Iterator[KeptWidth]:
    # By the full width as well: mixed runs can have a layer of one name in two sizes.
    kept: dict[tuple[str, int], list[int]] = defaultdict(list)
    for run in runs:
        for layer in run.pruned.layers if run.pruned else ():
            kept[layer.layer, layer.full].append(layer.kept)
    for (name, full), widths in kept.items():
        found = describe_seeds(widths)
        assert found is not None
        yield KeptWidth(name, found.mean, full, found.sd, found.n)


def _stages(runs: Sequence[RunRecord], sizes: Sizes) -> Iterator[LayerStage]:
    """Yield the layer stages, the largest size first: each seed's average over layers, then over seeds."""
    found: dict[Size, list[tuple[float, float, float, int]]] = defaultdict(list)
    for run in runs:
        layers: dict[Size, list[tuple[int, int]]] = defaultdict(list)
        for layer in run.pruned.layers if run.pruned else ():
            if layer.layer in sizes:
                layers[sizes[layer.layer]].append((layer.kept, layer.full))
        for size, pairs in layers.items():
            kept, full = np.array(pairs, dtype=float).T
            percent = 100 * float(np.mean(kept / full))
            found[size].append((float(kept.mean()), percent, float(full.mean()), len(pairs)))
    for size in sorted(found, key=_pixels, reverse=True):
        widths, shares = ([each[part] for each in found[size]] for part in (0, 1))
        width, share = describe_seeds(widths), describe_seeds(shares)
        assert width is not None
        assert share is not None
        full = float(np.mean([each[2] for each in found[size]]))
        yield LayerStage(size_name(size), max(each[3] for each in found[size]), full, width, share)


def _pixels(size: Size) -> int:
    return int(np.prod(size))


def _kernel_patterns(runs: Sequence[Sequence[KernelRecord]], sizes: Sizes) -> Iterator[KernelPattern]:
    """Yield the patterns of each layer stage and size of kernels: each seed's average over layers, then over seeds."""
    found: dict[tuple[Size | None, tuple[int, int]], list[tuple[np.ndarray, int]]] = defaultdict(list)
    for kernels in runs:
        layers: dict[tuple[Size | None, tuple[int, int]], list[np.ndarray]] = defaultdict(list)
        for kernel in kernels:
            kept = np.array(kernel.kept)
            layers[sizes.get(kernel.layer), (kept.shape[0], kept.shape[1])].append(kept)
        for key, shares in layers.items():
            found[key].append((np.mean(shares, axis=0), len(shares)))
    # Large outputs first; those of unknown size are the last.
    for size, shape in sorted(found, key=lambda key: (key[0] is None, -_pixels(key[0] or ()), key[1])):
        means, counts = zip(*found[size, shape], strict=True)
        kept = np.mean(means, axis=0)
        yield KernelPattern(size_name(size), max(counts), len(means), tuple(map(tuple, kept.tolist())))


def _layer_sizes(
    group: RunGroup, layers: Sequence[str], factory: Callable[..., Any] | None
) -> tuple[dict[str, Size], str]:
    """Return the output size of each layer, and in words why some are not known."""
    network = next((found for run in group.runs if (found := (run.study.settings or {}).get("model"))), None)
    name = network.get("name") if isinstance(network, dict) else group.study.model
    if ":" in str(name) and factory is None:
        how = "python -m rethink_prune.patterns builds it with --factory path.to.module:factory"
        return {}, f"{_NOT_KNOWN}: {name} is a network of your own, which no summary may import; {how}"
    if network is None:
        return {}, ""
    # Imported here: they need torch, and not every report has layers.
    from rethink_prune.surgery.architecture import selecting_module

    try:
        found = _module_sizes(json.dumps(network), group.study.model, factory if ":" in str(name) else None)
    except UserError as error:
        return {}, f"{_NOT_KNOWN}: {error}"
    modules = {layer: layer.partition("#")[0] for layer in layers}
    modules = {layer: selecting_module(module) or module for layer, module in modules.items()}
    missing = next((layer for layer, module in modules.items() if module not in found), None)
    why = "" if missing is None else f"the size of {missing} is not known: {name} as built has no such layer"
    return {layer: found[module] for layer, module in modules.items() if module in found}, why


@cache
def _module_sizes(network: str, where: str, factory: Callable[..., Any] | None) -> dict[str, Size]:
    """Return the output size of each module; `network` is its description as JSON.

    Raises
    ------
    UserError
        If it cannot be built, or cannot be run without values.
    """
    import torch

    from rethink_prune.cost import output_sizes
    from rethink_prune.finished.load import build_described, describes_network

    described = json.loads(network)
    if not describes_network(described):
        raise UserError(f"{where}: its summary describes no network")
    with torch.device("meta" if factory is None else "cpu"):  # a network of one's own may read values when it is built
        model = build_described(described, where, factory)
    return output_sizes(model, (described["in_channels"], *[described["image_size"]] * 2))
