"""The second part of a study: what its networks are worth as the start of a detector.

The entries are the networks that are transferred. ``unpruned`` starts from ``large``; ``prune_c`` from ``finetune``:
pruned and fine-tuned on classification; every other arm from that arm. ``prune_d`` goes on from the detector of
``unpruned``: its layers are put back into the classifier, pruned there to the widths of the study, and trained again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rethink_prune.config import TransferConfig
from rethink_prune.cost import Cost
from rethink_prune.detection.load import load_detection
from rethink_prune.detection.pictures import DetectionData
from rethink_prune.errors import UserError
from rethink_prune.pruning import Pruner, Target
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.seeds import seeded
from rethink_prune.store.stage import Done
from rethink_prune.study.budget import training_for
from rethink_prune.study.keys import KeyParts, architecture_key, optimizer_key
from rethink_prune.study.plan import UNPRUNED, StageSpec
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.schedule import OptimizerSpec

# torchvision, which detectors need, is slow to import: only studies with a transfer wait for it.
if TYPE_CHECKING:
    from rethink_prune.detection.detector import DetectorSpec

PREFIX = "detect_"
UNPRUNED_ENTRY, PRUNE_C, PRUNE_D = "unpruned", "prune_c", "prune_d"
# Options of the data and of the training; all others are the detector's.
_DATA = {"name", "root", "train_limit", "test_limit", "scenes", "test_scenes", "picture_size", "entries"}
_TRAINING = {
    *("epochs", "lr", "schedule", "milestones", "step", "gamma", "warmup"),
    *("batch_size", "momentum", "weight_decay", "clip_norm", "flip"),
}


def transfer_entries(options: TransferConfig, arms: Sequence[str]) -> dict[str, str]:
    """Return what is transferred, by the title of the stage it starts from.

    Raises
    ------
    UserError
        If an entry is asked for that the study does not have.

    Examples
    --------
    >>> options = TransferConfig(name="voc", epochs=7, lr=0.001)
    >>> transfer_entries(options, ["finetune", "scratch_e"])
    {'unpruned': 'large', 'prune_c': 'finetune', 'prune_d': 'detect_unpruned', 'scratch_e': 'scratch_e'}
    """
    there = {UNPRUNED_ENTRY: "large", PRUNE_C: "finetune", PRUNE_D: f"{PREFIX}{UNPRUNED_ENTRY}"}
    there = {entry: start for entry, start in there.items() if start != "finetune" or start in arms}
    there |= {arm: arm for arm in arms if arm != "finetune"}
    if options.entries is None:
        return there
    for entry in options.entries:
        if entry not in there:
            hint = "add finetune to arms" if entry == PRUNE_C else f"there are: {', '.join(there)}"
            raise UserError(f"transfer.entries: {entry}: no such entry in this study; {hint}")
    if PRUNE_D in options.entries and UNPRUNED_ENTRY not in options.entries:
        raise UserError(f"transfer.entries: {PRUNE_D} goes on from {UNPRUNED_ENTRY}, which has to be there as well")
    return {entry: there[entry] for entry in there if entry in options.entries}


@dataclass(frozen=True)
class _Facts:
    """What has to be known of pictures to plan: classes, how many there are to train on, and heights and widths."""

    classes: tuple[str, ...]
    train_pictures: int
    sizes: Sequence[tuple[int, int]]


# Known without the pictures, so that a dry run downloads nothing. Most pictures have this size, or are upright ones.
_VOC_2007 = _Facts(
    (
        *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
        *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
    train_pictures=5_011,
    sizes=((375, 500),),
)


@dataclass(frozen=True)
class Transfer:
    """What a study's networks are transferred to.

    Attributes
    ----------
    options : TransferConfig
    entries : mapping of str to str
        See `transfer_entries`.
    input_shape : tuple of int
        Of one image of the classifier.
    download_to : Path
        Where pictures are kept that are downloaded.
    """

    options: TransferConfig
    entries: Mapping[str, str]
    input_shape: tuple[int, int, int]
    download_to: Path

    @property
    def needs_large(self) -> bool:
        """Whether the unpruned network has to be trained for it."""
        return UNPRUNED_ENTRY in self.entries

    @cached_property
    def data(self) -> DetectionData:
        """The pictures; they are read, or downloaded, when this is first asked for."""
        return load_detection(self.options, self.download_to)

    @cached_property
    def _facts(self) -> _Facts:
        if self.options.name == "voc" and self.options.root is None:
            pictures = min(self.options.train_limit or _VOC_2007.train_pictures, _VOC_2007.train_pictures)
            return replace(_VOC_2007, train_pictures=pictures)
        return _Facts(self.data.train.classes, len(self.data.train), self.data.train.sizes)

    def optimizer(self) -> OptimizerSpec:
        """Return how a detector is trained."""
        options = self.options
        training = training_for(options, options.epochs, options.epochs)
        return OptimizerSpec(
            optimizer="sgd",
            lr=float(options.lr),
            momentum=options.momentum,
            nesterov=False,
            weight_decay=options.weight_decay,
            schedule="multistep" if options.schedule == "step" else options.schedule,
            **asdict(training),
            warmup=options.warmup,
        )

    def spec(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> "DetectorSpec":
        """Return what detectors are built for; without how images are normalised, to count or to try."""
        from rethink_prune.detection.detector import DetectorSpec

        ones = (1.0,) * self.input_shape[0]
        return DetectorSpec(
            self.options, self._facts.classes, tuple(mean or ones), tuple(std or ones), self.input_shape
        )

    def cost(self, classifier: nn.Module, architecture: Architecture) -> Cost:
        """Return the cost of a detector around a classifier, which becomes a part of it."""
        from rethink_prune.detection.detector import build_detector, detector_cost

        spec = self.spec()
        sizes = [_resized(size, self.options) for size in self._facts.sizes]
        mean = tuple(round(sum(sides) / len(sizes)) for sides in zip(*sizes, strict=True))
        with seeded(0):  # its own layers are drawn
            detector = build_detector(classifier, spec)
        return detector_cost(detector, spec, (mean[0], mean[1]), architecture.masks)

    def train_flops(self, cost: Cost) -> int:
        """Return the FLOPs of training a detector of this cost."""
        pictures = self._facts.train_pictures * (2 if self.options.flip else 1)
        return cost.train_flops(pictures * self.options.epochs)

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, for summaries."""
        options = self.options.model_dump(mode="json", exclude={"root", "entries"})
        test = self.data.test
        return {
            **options,
            "fingerprint": self.fingerprint,
            "classes": list(test.classes),
            "test_pictures": len(test),
        }

    @property
    def fingerprint(self) -> str:
        """Of the pictures for training and those for the test."""
        return f"{self.data.train.fingerprint}-{self.data.test.fingerprint}"

    def check(self, classifier: nn.Module, pruner: Pruner, target: Target) -> None:
        """Raise `UserError` if a study's networks cannot be transferred; `classifier` becomes part of a detector."""
        if self.input_shape[0] != 3:
            raise UserError("transfer: pictures have three channels; take dataset.channels=3")
        if PRUNE_D in self.entries and (pruner.fresh_only or not isinstance(target, ChannelTarget)):
            others = ",".join(entry for entry in self.entries if entry != PRUNE_D)
            raise UserError(
                f"transfer: {PRUNE_D} prunes the detector's channels by their scores, or to known widths, and "
                f"pruner={pruner.options.name} has neither; leave it out: transfer.entries=[{others}]"
            )
        from rethink_prune.detection.detector import build_detector

        with seeded(0):
            build_detector(classifier, self.spec())


def _resized(size: tuple[int, int], options: TransferConfig) -> tuple[float, float]:
    """Return the size in which a detector gets a picture."""
    scale = min(options.min_size / min(size), options.max_size / max(size))
    return size[0] * scale, size[1] * scale


def entry_of(title: str) -> str:
    """Return the entry of a detection stage's title.

    Examples
    --------
    >>> entry_of("detect_prune_c")
    'prune_c'
    """
    return title.removeprefix(PREFIX)


def plan_transfer(
    transfer: Transfer,
    build: Callable[[Architecture], nn.Module],
    arms: Sequence[StageSpec],
    pruned: Architecture | None,
) -> tuple[StageSpec, ...]:
    """Return the detection stages of a study.

    Parameters
    ----------
    transfer : Transfer
    build : callable
        Gives the classifier of an architecture, with any weights.
    arms : sequence of StageSpec
        The study's, as far as they are known.
    pruned : Architecture, optional
        What pruning leaves, if that is known.
    """
    named = {name: spec for spec in arms for name in spec.names}
    costs: dict[int, Cost] = {}
    specs = []
    for entry, start in transfer.entries.items():
        architecture = UNPRUNED if start == "large" else named[start].architecture if start in named else pruned
        if architecture is not None and id(architecture) not in costs:
            costs[id(architecture)] = transfer.cost(build(architecture), architecture)
        cost = costs.get(id(architecture))
        specs.append(
            StageSpec(
                title=f"{PREFIX}{entry}",
                kind="detect",
                parent=named[start].title if start in named else start,
                optimizer=transfer.optimizer(),
                architecture=architecture,
                cost=cost,
                train_flops=None if cost is None else transfer.train_flops(cost),
            )
        )
    return tuple(specs)


def transfer_key(
    spec: StageSpec, parent: Done, transfer: Transfer, parts: KeyParts, study: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what decides the result of a detection stage.

    Parameters
    ----------
    spec : StageSpec
    parent : Done
        The stage it starts from: its weights count, however they were found.
    transfer : Transfer
    parts : KeyParts
        Of the study.
    study : mapping
        How images are normalised; for ``prune_d`` also how it is pruned.
    """
    assert spec.optimizer is not None
    assert spec.architecture is not None
    options = transfer.options.model_dump(mode="json")
    training = {name: options[name] for name in ("batch_size", "clip_norm", "flip")}
    return {
        "start": parent.stage.digest,
        "network": parts.training["network"],
        "architecture": architecture_key(spec.architecture),
        "data": transfer.fingerprint,
        "detector": {name: value for name, value in options.items() if name not in _DATA | _TRAINING},
        "training": {**optimizer_key(spec.optimizer), **training, "precision": parts.training["training"]["precision"]},
        "seed": parts.training["seed"],
        **study,
    }
