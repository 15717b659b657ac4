"""How sensitive each layer is: prune one layer alone, by several ratios, and evaluate what is left.

The scan of Li et al. 2017 (section 3.2, figure 2), by any pruner that takes a ratio for a layer. Every network is
evaluated twice without retraining: as pruned, and with batch-norm statistics that are estimated anew.
"""

import csv
import glob
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rethink_prune.copying import copy_network
from rethink_prune.cost import count_cost
from rethink_prune.data import Epoch
from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically, write_json
from rethink_prune.finished.load import Factory, load_model, read_config
from rethink_prune.finished.scan_source import ScanSource, layer_pruner
from rethink_prune.pruning import PruneResult, find_pruner
from rethink_prune.pruning.selection import kept_count
from rethink_prune.seeds import derive_generator, derive_seed, seeded
from rethink_prune.store.store import Store
from rethink_prune.study.inputs import Inputs
from rethink_prune.text import markdown
from rethink_prune.training.distributed import ALONE
from rethink_prune.training.evaluate import evaluate
from rethink_prune.training.recalibrate import recalibrate
from rethink_prune.training.runtime import Runtime, describe_device

FORMAT = "rethink-prune sensitivity 1"
SENSITIVITY_FILE = "sensitivity.json"
# The layers that the example of a skip list names.
_SHOWN = 3


@dataclass(frozen=True)
class SensitivityRow:
    """One layer pruned alone.

    Attributes
    ----------
    layer : str
        As in ``pruner.ratio`` and ``pruner.skip``.
    ratio : float
        Share of its channels (or weights) to remove.
    kept, full : int
        Channels (or weights) that stay, of how many.
    top1, top1_recalibrated : float
        Percent on the test images: as pruned, and with statistics estimated anew.
    macs : int
        MACs of the whole network for one image.
    """

    layer: str
    ratio: float
    kept: int
    full: int
    top1: float
    top1_recalibrated: float
    macs: int


@dataclass(frozen=True)
class SensitivityScan:
    """What `scan` found.

    Attributes
    ----------
    stage, network, dataset : str
        The unpruned network and the images.
    pruner : mapping
        Name and options, without those that say how much goes.
    seed : int
    device, precision : str
    test_images, train_images : int
        Images that networks are evaluated on, and that statistics are estimated on (of more than 50,000, so many).
    top1, top1_recalibrated : float
        Of the unpruned network, in percent; the second with its statistics estimated anew like the others'.
    macs : int
        Of the unpruned network, for one image.
    rows : tuple of SensitivityRow
        Layers in network order, each with ascending ratios.
    """

    stage: str
    network: str
    dataset: str
    pruner: Mapping[str, Any]
    seed: int
    device: str
    precision: str
    test_images: int
    train_images: int
    top1: float
    top1_recalibrated: float
    macs: int
    rows: tuple[SensitivityRow, ...]

    @property
    def layers(self) -> dict[str, list[SensitivityRow]]:
        """The rows of each layer, in network order."""
        layers: dict[str, list[SensitivityRow]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, []).append(row)
        return layers

    @property
    def most_sensitive_first(self) -> list[str]:
        """The layers, by how much recalibrated top-1 their largest ratio costs; of equals, the next smaller decides."""
        losses = {
            layer: [self.top1_recalibrated - row.top1_recalibrated for row in reversed(rows)]
            for layer, rows in self.layers.items()
        }
        return sorted(losses, key=lambda layer: losses[layer], reverse=True)


def scan(
    source: ScanSource, ratios: Sequence[float], runtime: Runtime, factory: Factory | None = None
) -> SensitivityScan:
    """Prune every layer alone by every ratio, and evaluate each network as pruned and with new statistics.

    Parameters
    ----------
    source : ScanSource
        The network, the pruner and the images.
    ratios : sequence of float
        Shares to remove, ascending, each in (0, 1).
    runtime : Runtime
        Where and how networks are evaluated.
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Raises
    ------
    UserError
        If the stage cannot be loaded, or the pruner takes no ratio for a single layer or does not fit the network or
        the images.
    """
    config, network = source.config, read_config(source.stage)["network"]["name"]
    inputs = Inputs(config.dataset, config.recipe, config.seed, runtime, ALONE, Store(Path(config.store.root)).cache)
    model = load_model(source.stage.folder, factory)
    single = _LayerPruner(model, network, source.pruner, inputs)
    sizes = single.find_layers(max(ratios))
    whole = _evaluate_twice(copy_network(model), inputs)
    macs = count_cost(model, inputs.image_shape).macs
    rows = []
    places = [(layer, ratio) for layer in sizes for ratio in ratios]
    with tqdm(places, desc="scan", unit="network", leave=False, disable=not runtime.show_progress) as bar:
        for layer, ratio in bar:
            bar.set_postfix_str(layer)
            full = sizes[layer]
            result = single.prune(layer, ratio, full)
            if result is None:
                rows.append(SensitivityRow(layer, ratio, full, full, *whole, macs))
                continue
            (kept,) = (width.kept for width in result.report.layers if width.layer == layer)
            # Counted first: the evaluation moves the network to the device.
            cost = count_cost(result.model, inputs.image_shape, masks=result.architecture.masks)
            found = _evaluate_twice(result.model, inputs)
            rows.append(SensitivityRow(layer, ratio, kept, full, *found, cost.macs))
    return SensitivityScan(
        stage=source.stage.name,
        network=network,
        dataset=config.dataset.name,
        pruner=source.pruner,
        seed=config.seed,
        device=describe_device(runtime.device),
        precision=runtime.precision,
        test_images=inputs.info.test_images,
        train_images=inputs.info.train_images,
        top1=whole[0],
        top1_recalibrated=whole[1],
        macs=macs,
        rows=tuple(rows),
    )


class _LayerPruner:
    """Prunes single layers of one network; the network stays as it is."""

    def __init__(self, model: nn.Module, network: str, options: Mapping[str, Any], inputs: Inputs) -> None:
        self._model, self._network, self._options, self._inputs = model, network, options, inputs
        self._example = torch.zeros(1, *inputs.image_shape)

    def find_layers(self, ratio: float) -> dict[str, int]:
        """Return the layers that may be pruned, with their widths; raise `UserError` if `ratio` cannot be taken."""
        pruner = layer_pruner(self._options, ratio)
        target = pruner.target(self._model, self._example, self._network)
        pruner.check_images(target, self._inputs.info.train_images)
        return {width.layer: width.full for width in target.report().layers}

    def prune(self, layer: str, ratio: float, full: int) -> PruneResult | None:
        """Return the network with one layer pruned; None if the ratio leaves all of its `full` channels."""
        # Escaped: a name is read as a pattern, which others might match.
        pruner = layer_pruner(self._options, {glob.escape(layer): ratio})
        if getattr(pruner, "kept_count", kept_count)(full, ratio) == full:
            return None
        target, seed = pruner.target(self._model, self._example, self._network), self._inputs.seed
        # As a study's stage `prune` does it.
        with seeded(derive_seed(seed, "prune")):
            return pruner.prune(
                self._model,
                target,
                data=Epoch(self._inputs.train_batches, 0) if pruner.needs_data else None,
                generator=derive_generator(seed, "prune"),
            )


def _evaluate_twice(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Return top-1 of a network, in percent, as it is and with statistics estimated anew; changes the network."""
    runtime, images = inputs.runtime, inputs.evaluations["test"]
    top1 = evaluate(runtime.place(model), images, runtime=runtime).top1
    if not recalibrate(model, inputs.recalibration(), runtime=runtime):
        return top1, top1
    return top1, evaluate(model, images, runtime=runtime).top1


def sensitivity_text(found: SensitivityScan) -> str:
    """Return what `scan` found as a table, the most sensitive layer first, and what its numbers mean."""
    layers, order = found.layers, found.most_sensitive_first
    ratios = [row.ratio for row in layers[order[0]]]
    columns = ["layer", "width", f"MACs saved at {ratios[-1]:g}", *(f"{ratio:g}" for ratio in ratios)]
    rows = []
    for layer in order:
        its = layers[layer]
        saved = 100 * (1 - its[-1].macs / found.macs)
        changes = [
            f"{row.top1 - found.top1:+.2f} / {row.top1_recalibrated - found.top1_recalibrated:+.2f}" for row in its
        ]
        rows.append([layer, f"{its[0].full:,}", f"{saved:.2f} %", *changes])
    title = (
        f"{found.network} ({found.stage}) on {found.dataset}, {found.pruner['name']}, seed {found.seed}: top-1 "
        f"{found.top1:.2f} % unpruned, {found.top1_recalibrated:.2f} % with statistics re-estimated"
    )
    return "\n\n".join([title, markdown(columns, rows), *_scan_notes(found, order)])


def _scan_notes(found: SensitivityScan, order: Sequence[str]) -> list[str]:
    notes = [
        "One layer is pruned, by the ratio above the column, and nothing is retrained. Points of top-1 against the "
        "unpruned network: as pruned / with statistics re-estimated in both. The layer that loses most by the second "
        "number at the largest ratio comes first.",
        f"{found.test_images:,} test images: one is {100 / found.test_images:.2f} points. One network. Whoever chooses "
        "layers by this table chooses by test images.",
    ]
    if "skip" in find_pruner(found.pruner["name"]).options_type.model_fields:
        listed = ",".join(order[:_SHOWN])
        notes.append(
            f"To leave layers whole in a study, such as the first {len(order[:_SHOWN])}: pruner.skip=[{listed}]"
        )
    return notes


def check_scan_folder(folder: Path, source: ScanSource) -> None:
    """Raise `UserError` if a folder holds anything but an earlier scan of the same network by the same pruner."""
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
        content = json.loads((folder / SENSITIVITY_FILE).read_text())
        own = (content["format"], content["stage"], content["pruner"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        own = None
    if own != (FORMAT, source.stage.name, source.pruner["name"]):
        raise UserError(f"--out {folder}: holds something else already; name another folder")


def write_scan(found: SensitivityScan, folder: Path) -> None:
    """Write ``sensitivity.json`` and ``sensitivity.csv``; raise `UserError` if the folder cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name a folder you can write") from None
    text = io.StringIO()
    # The default line end is that of Windows, on every system.
    writer = csv.DictWriter(text, [field.name for field in fields(SensitivityRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, found.rows))
    write_atomically(folder / "sensitivity.csv", text.getvalue().encode())
    # Last: it marks the folder as a scan's.
    write_json(folder / SENSITIVITY_FILE, {"format": FORMAT, **asdict(found)})
