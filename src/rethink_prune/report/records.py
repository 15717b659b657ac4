"""What a run's ``summary.json`` says, as far as a report uses it: checked when it is read."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def printable(text: str) -> str:
    r"""Return `text` with a question mark for each character that no page can show, such as control characters.

    Examples
    --------
    >>> printable("resnet\n\x00")
    'resnet??'
    """
    # Nearly all are; a letter at a time takes long.
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def value_text(value: Any) -> str:
    """Return a value of a summary in words.

    Examples
    --------
    >>> value_text("sgd"), value_text(None), value_text([80, 120])
    ('sgd', 'null', '[80, 120]')
    """
    return printable(value if isinstance(value, str) else json.dumps(value))


def _whole_curve(value: Any) -> Any:
    """Return None for a curve with a gap."""
    return None if isinstance(value, list) and None in value else value


# Names go into terminals, pages and file names, whoever wrote the summary.
Text = Annotated[str, AfterValidator(printable)]


class SummaryPart(BaseModel):
    """Part of a summary; fields that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TrainingRecord(SummaryPart):
    """One training of a run.

    Attributes
    ----------
    reason
        Why it failed.
    train_flops, train_flops_total
        Its own, and with its ancestors'.
    stage
        Name of its stage.
    processes
        The different numbers of processes its epochs were trained by; empty if that is not known.
    curve
        Its result after each epoch, where the stage is still there.
    """

    status: Literal["done", "failed", "unfinished"] = "done"
    reason: Text | None = None
    epochs: int | None = None
    params: int | None = None
    macs: int | None = None
    train_flops: float | None = None
    train_flops_total: float | None = None
    stage: Text | None = None
    # Summaries from before there were several processes do not have it.
    processes: tuple[int, ...] = (1,)
    curve: Annotated[tuple[float, ...] | None, BeforeValidator(_whole_curve)] = None

    @property
    def result(self) -> float | None:
        """What it is compared by, in percent after the last epoch."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether it has a result to compare."""
        return self.status == "done" and self.result is not None

    @property
    def flops_before(self) -> float | None:
        """Training FLOPs of its ancestors."""
        if self.train_flops is None or self.train_flops_total is None:
            return None
        return self.train_flops_total - self.train_flops


class TrainedRecord(TrainingRecord):
    """One trained network of a run: an arm, or the unpruned network.

    Attributes
    ----------
    top1, top1_best
        Percent on the test images: after the last epoch, and of the best epoch.
    train_flops_with_search
        Training FLOPs with those of its ancestors, and of the trainings that found the pruned network's widths (earlier
        versions do not say).
    """

    top1: float | None = None
    top1_best: float | None = None
    train_flops_with_search: float | None = None

    @property
    def result(self) -> float | None:
        """Top-1."""
        return self.top1


class DetectorRecord(TrainingRecord):
    """One detector of a run with a transfer, by the network that it starts from.

    Attributes
    ----------
    map, map_best, best_epoch
        Mean average precision on the test pictures in percent: after the last epoch, and of the best epoch.
    ap
        Average precision by class, in percent; None for a class that has none.
    coco
        COCO's average precision in percent, where it was computed: ``map``, ``map_50`` and ``map_75``.
    """

    map: float | None = None
    map_best: float | None = None
    best_epoch: int | None = None
    ap: dict[Text, float | None] = Field(default_factory=dict)
    coco: dict[Text, float | None] | None = None

    @property
    def result(self) -> float | None:
        """Mean average precision."""
        return self.map


class LayerRecord(SummaryPart):
    """Width of a layer before and after pruning."""

    layer: Text
    kept: int
    full: int


class KernelRecord(SummaryPart):
    """A convolution of which single weights are gone: `kept` is the share of its kernels that keep each position."""

    layer: Text
    kept: tuple[tuple[float, ...], ...]


class PrunedRecord(SummaryPart):
    """The pruned network before any retraining; `kernels` where its masks were read."""

    params: int | None = None
    macs: int | None = None
    top1: float | None = None
    top1_recalibrated: float | None = None
    stage: Text | None = None
    layers: tuple[LayerRecord, ...] = ()
    kernels: tuple[KernelRecord, ...] = ()


class RoundRecord(SummaryPart):
    """One round of a study that prunes in several.

    Attributes
    ----------
    params, channels, macs
        What remains after it: parameters without masked ones, channels (None where single weights go), and MACs per
        image.
    top1_before, top1, top1_recalibrated, top1_trained
        Percent on the test images: of the network that it pruned, after pruning, with re-estimated statistics, and
        after the training between this round and the next. None for the last round's training: the arms are that.
    epochs, train_flops
        Of the training between this round and the next.
    stage, trained_stage
        Names of the stages of pruning and of that training.
    """

    round: int
    params: int | None = None
    channels: int | None = None
    macs: int | None = None
    top1_before: float | None = None
    top1: float | None = None
    top1_recalibrated: float | None = None
    top1_trained: float | None = None
    epochs: int | None = None
    train_flops: float | None = None
    stage: Text | None = None
    trained_stage: Text | None = None


class LedgerRecord(SummaryPart):
    """What the budget was computed from."""

    params_unpruned: int | None = None
    macs_reference: int | None = None


class StudyRecord(SummaryPart):
    """What was asked for."""

    experiment: Text | None = None
    dataset: Text
    model: Text
    pruner: Text
    target: dict[str, Any]
    recipe: Text
    budget: Text
    seed: int
    device: Text = ""
    precision: Text = ""
    train_images: int | None = None
    test_images: int | None = None
    arms: tuple[Text, ...] = ()
    tracker: tuple[Text, ...] = ()
    settings: dict[str, Any] | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)
    ledger: LedgerRecord = LedgerRecord()

    @property
    def target_text(self) -> str:
        """How much the pruner was told to remove, in words, and in how many rounds where these are several."""
        target = ", ".join(f"{printable(name)} {value_text(value)}" for name, value in self.target.items())
        return f"{target} in {self.rounds} rounds" if self.rounds else target

    @property
    def rounds(self) -> int | None:
        """In how many rounds it prunes; None for a single cut."""
        rounds = self._pruner_option("rounds")
        return rounds if isinstance(rounds, int) and rounds > 1 else None

    @property
    def between_rounds(self) -> str:
        """What happens to the weights between rounds; nothing for a single cut."""
        return str(self._pruner_option("between_rounds") or "") if self.rounds else ""

    @property
    def transfer(self) -> dict[str, Any]:
        """The settings of the transfer; nothing without one."""
        found = (self.settings or {}).get("transfer")
        return found if isinstance(found, dict) else {}

    def _pruner_option(self, name: str) -> Any:
        options = (self.settings or {}).get("pruner")
        return options.get(name) if isinstance(options, dict) else None


class RunRecord(SummaryPart):
    """One run: a summary, and the name of its folder.

    Attributes
    ----------
    name
        The folder as it was found, without what leads to the place that was searched.
    unfinished
        What it trains now, or was training when it was stopped: `train_flops` and `epochs` are what is planned.
    early
        The unpruned network as far as weights are rewound to it.
    rounds
        Those that are done, of a study that prunes in several.
    transfer
        The detectors that are trained, by what they start from; none without a transfer.
    """

    name: Text
    study: StudyRecord
    large: TrainedRecord | None = None
    sparse: TrainedRecord | None = None
    early: TrainedRecord | None = None
    pruned: PrunedRecord | None = None
    arms: dict[Text, TrainedRecord] = Field(default_factory=dict)
    unfinished: dict[Text, TrainedRecord] = Field(default_factory=dict)
    rounds: tuple[RoundRecord, ...] = ()
    transfer: dict[Text, DetectorRecord] = Field(default_factory=dict)

    @property
    def trained(self) -> dict[str, TrainedRecord]:
        """Everything trained so far, by name: the unpruned networks and the arms."""
        bases = {"large": self.large, "sparse": self.sparse}
        return {name: entry for name, entry in bases.items() if entry is not None} | self.arms

    def without_transfer(self) -> Self:
        """Return the run as if its networks had been transferred to nothing: their classification is the same."""
        settings = {name: value for name, value in (self.study.settings or {}).items() if name != "transfer"}
        return self.model_copy(update={"transfer": {}, "study": self.study.model_copy(update={"settings": settings})})

    @property
    def params_unpruned(self) -> int | None:
        """Parameters of the unpruned network, also where none is trained; None in old summaries."""
        return self.large.params if self.large else self.study.ledger.params_unpruned
