"""The configuration as validated, frozen models.

Hydra composes the tree; :func:`parse_config` turns it into :class:`StudyConfig`, or into one error that lists
everything that is wrong with it. Nothing below ``study.py`` sees the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from rethink_prune.errors import UserError, suggestion

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# The upper bounds catch slips of the keyboard before they reach an allocator.
Count = Annotated[int, Field(ge=1, le=10**9)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# Of a data set that the package `datasets` loads.
HUB_OPTIONS = ("path", "config", "revision", "train_split", "test_split", "image_key", "label_key", "streamed")
TRACKERS = ("wandb", "trackio", "mlflow")
TARGET_OPTIONS = ("ratio", "variant", "widths", "size", "target_macs", "target_params", "share_per_round")


class Frozen(BaseModel):
    """A part of the configuration: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Part = TypeVar("Part", bound=Frozen)


class DatasetConfig(Frozen):
    """Which images, and how they are augmented and read.

    Attributes
    ----------
    name : str
        One of :mod:`rethink_prune.data.sources`, or ``path.to.module:factory``, see
        :mod:`rethink_prune.data.sources.own`.
    root : str or None
        Where the images are, or for CIFAR (default ``datasets``) are downloaded to; digits need none.
    path, config, revision, train_split, test_split, image_key, label_key, streamed
        Of ``huggingface`` alone, see :mod:`rethink_prune.data.sources.huggingface`.
    image_size : int or None
        Height and width in pixels that images are brought to; None keeps them (digits: 16, ImageNet: 224).
    channels : int
        3 for colour, 1 for grey.
    train_limit, test_limit : int or None
        Use a class-balanced subset of so many images.
    validation : float
        Fraction of each class's training images that is held out, before `train_limit`; in [0, 1).
    split_seed : int
        Decides which images are held out or taken.
    mean, std : tuple of float or None
        Per channel, on the [0, 1] scale; by default the paper's for CIFAR, the field's for ImageNet, and otherwise
        those of the training images.
    pad : int
        Pixels of padding on each side before the random crop; not used for images that are decoded in every epoch.
    flip : bool
        Mirror half of the training images.
    workers : int or None
        Processes that decode images in every epoch; 0 for none, None for one for every core, at most 16.
    args : dict
        Further arguments of a user's own factory.
    """

    name: str
    root: str | None = None
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    image_key: str = "image"
    label_key: str = "label"
    streamed: bool = False
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    channels: Literal[1, 3] = 3
    train_limit: Count | None = None
    test_limit: Count | None = None
    validation: float = Field(0.0, ge=0, lt=1)
    split_seed: int = Field(0, ge=0)
    mean: tuple[Finite, ...] | None = None
    std: tuple[Positive, ...] | None = None
    pad: int = Field(0, ge=0, le=1024)
    flip: bool = False
    workers: int | None = Field(None, ge=0, le=1024)
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _statistics_per_channel(self) -> DatasetConfig:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} needs {self.channels} value(s), one per channel; got {len(values)}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        return self

    @model_validator(mode="after")
    def _hub_options_have_a_use(self) -> DatasetConfig:
        fields = type(self).model_fields
        given = [name for name in HUB_OPTIONS if getattr(self, name) != fields[name].default]
        if given and self.name != "huggingface":
            raise ValueError(f"{', '.join(given)}: only dataset=huggingface takes this")
        return self

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> DatasetConfig:
        """Return the same options with another `mean` and `std`; raises `UserError` if they do not fit the channels.

        Examples
        --------
        >>> DatasetConfig(name="digits", channels=1).with_statistics([0.5], [0.25]).std
        (0.25,)
        """
        return _parse_part(DatasetConfig, {**self.model_dump(), "mean": mean, "std": std}, "dataset")


class ModelConfig(Frozen):
    """Which network; every further key is an option of it, and `args` go to the factory of a network of one's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    init: str | None = None
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _options_leave_the_sizes(self) -> ModelConfig:
        for name in ("num_classes", "in_channels"):
            if name in {**self.options, **self.args}:
                raise ValueError(f"{name} comes from the data set")
        # A factory of one's own may call something else so.
        if "image_size" in self.options:
            raise ValueError("image_size comes from the data set: dataset.image_size")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return self.model_extra or {}


# The names of the choices are no part of what an error says, see `_line`.
Rate = Annotated[
    Annotated[Positive, Tag("union, a number")] | Annotated[Literal["auto"], Tag("union, auto")],
    Discriminator(lambda rate: "union, auto" if rate == "auto" else "union, a number"),
]


class Phase(Frozen):
    """One training: its length and learning rate, which rises over `warmup` epochs.

    Milestones below 1 are fractions of the epochs. ``lr=auto``, for fine-tuning, is described in
    ``training/adaptive_start.py``.
    """

    epochs: Count
    lr: Rate
    schedule: Literal["multistep", "step", "cosine", "constant", "linear"] = "multistep"
    milestones: tuple[Finite, ...] = ()
    step: Count | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | tuple[Positive, ...] = 0.1
    warmup: int = Field(0, ge=0)

    @field_validator("milestones")
    @classmethod
    def _milestones_ascend(cls, milestones: tuple[Finite, ...]) -> tuple[Finite, ...]:
        if any(not m > 0 or (m >= 1 and m != int(m)) for m in milestones):
            raise ValueError("must be epochs (whole numbers from 1) or fractions of the epochs (below 1)")
        if len({m < 1 for m in milestones}) > 1:
            raise ValueError("must be either all epochs or all fractions")
        if list(milestones) != sorted(milestones):
            raise ValueError("must ascend")
        return tuple(int(m) if m >= 1 else m for m in milestones)

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Phase:
        if late := ", ".join(str(m) for m in self.milestones if m >= self.epochs and m >= 1):
            advice = "give earlier ones, or fractions of the epochs"
            raise ValueError(f"milestones {late}: come after the {self.epochs} epochs; {advice}")
        if (self.schedule == "step") != (self.step is not None):
            raise ValueError("schedule=step and step (epochs between two drops) go together")
        if isinstance(self.gamma, tuple) and (self.schedule != "multistep" or len(self.gamma) != len(self.milestones)):
            raise ValueError("a list of gamma needs schedule=multistep and as many milestones")
        if self.lr == "auto" and self.schedule != "linear":
            raise ValueError("lr=auto is the start of a linear schedule: it needs schedule=linear")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup={self.warmup}: must be shorter than the training, epochs={self.epochs}")
        return self


class RatedPhase(Phase):
    """A training whose learning rate is a number."""

    @field_validator("lr")
    @classmethod
    def _rate_is_a_number(cls, rate: Rate) -> Rate:
        if rate == "auto":
            raise ValueError("must be a number: auto is for recipe.finetune.lr, after pruning")
        return rate


class Strengths(Frozen):
    """Strengths of the penalties of pruners that train their own way; None leaves them as published."""

    slimming: Positive | None = None
    sss: Positive | None = None


class Distillation(Frozen):
    """How arms with a teacher learn from it: `weight` is its share in the loss, `temperature` divides the logits."""

    temperature: Positive = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9


class RecipeConfig(RatedPhase):
    """How networks are trained; `epochs` is the length of ``large``.

    `strengths` are for a training that is too short for the published ones.

    Attributes
    ----------
    mixup, cutmix : float
        Alpha of the Beta distribution of the shares in which images of a batch are mixed; 0: not mixed this way. With
        both, each batch is mixed in one of the two ways. See ``data/mixing.py``.
    rand_augment : int
        Strength of two random operations on each training image; 0: without. See ``data/rand_augment.py``.
    """

    name: str
    batch_size: Count = 64
    eval_batch_size: Count = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: NonNegative = 1e-4
    decay_norms: bool = True
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: bool = True
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    rand_augment: int = Field(0, ge=0, le=30)
    strengths: Strengths = Strengths()
    distillation: Distillation = Distillation()
    finetune: Phase


class BudgetConfig(Frozen):
    """How long Scratch-B may train."""

    name: str
    base_epochs: Count | None = None
    cap: float | None = Field(None, ge=1, allow_inf_nan=False)
    add_finetune_epochs: bool = False
    reference_model: str | None = None


class StoreConfig(Frozen):
    """Where stages are kept, and how often an unfinished one is saved."""

    root: str
    checkpoint_seconds: NonNegative = 60.0


class LargeConfig(Frozen):
    """The unpruned network: weights to take instead of training it, and whether to train it for its own sake."""

    checkpoint: str | None = None
    baseline: bool = False


PerLayerRatio = float | list[float] | dict[str, float]
Widths = list[int] | dict[str, int]


Share = Annotated[float, Field(ge=0, lt=1)]

# Options of pruners of which the keys of stages have what follows from them.
_RESOLVED = {"rounds", "share_per_round", "between_rounds", "redraw"}
# Options of pruners that came after the first stages were stored.
_LATER = {"recalibrate", "min_share", "distribution", "intercept", "attention", "approximate"}


class PrunerOptions(Frozen):
    """What every pruner takes. A pruner adds its own options in a subclass beside its code.

    With `recalibrate`, fine-tuning starts with batch norms whose statistics were estimated anew in the pruned network.

    Attributes
    ----------
    rounds : int or None
        Prune in so many steps, each of what the step before left; see ``pruning/rounds.py``.
    share_per_round : float or None
        What each round removes of what is left; None: the rounds reach the target in equal shares.
    between_rounds : {"init", "epoch", "none"}
        How the network is trained between two rounds: from the weights it had before any training, from those it had
        after ``rewind.epoch`` epochs, or on, as fine-tuning does.
    redraw : {"nonzeros", "dense"}
        The fan-out by which scratch arms draw weights: that of the pruned network, or that of the unpruned one.
    """

    name: str
    recalibrate: bool = False
    rounds: int | None = None
    share_per_round: Annotated[float, Field(gt=0, lt=1)] | None = None
    between_rounds: Literal["init", "epoch", "none"] = "init"
    redraw: Literal["nonzeros", "dense"] = "nonzeros"

    @field_validator("rounds")
    @classmethod
    def _rounds_are_several(cls, rounds: int | None) -> int | None:
        if rounds is not None and not 2 <= rounds <= 1000:
            raise ValueError("must be from 2 to 1000; for one round, leave it out (null)")
        return rounds

    @model_validator(mode="after")
    def _shares_need_rounds(self) -> Self:
        if self.rounds is None and self.share_per_round is not None:
            raise ValueError(f"share_per_round={self.share_per_round:g}: needs rounds, e.g. pruner.rounds=5")
        if self.rounds is None and self.between_rounds != "init":
            raise ValueError(f"between_rounds={self.between_rounds}: needs rounds, e.g. pruner.rounds=5")
        return self

    def key(self) -> dict[str, Any]:
        """Return the options as plain values; those that came later only where they differ from their default."""
        fields = type(self).model_fields
        unused = {name for name in _LATER & fields.keys() if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude=unused | _RESOLVED)

    @property
    def target_option(self) -> str:
        """Name of the option that states the target: what is to go."""
        raise NotImplementedError

    def with_strength(self, recipe: float | None, *, network: str, dataset: str) -> Self:
        """Return the options with the strength of a penalty filled in where it is left open.

        Parameters
        ----------
        recipe : float, optional
            What the recipe says; otherwise it is what was published for `network` and `dataset`.
        """
        return self


class TargetOptions(PrunerOptions):
    """Options of a pruner whose target is stated by exactly one of the :data:`TARGET_OPTIONS`.

    Attributes
    ----------
    example_target : str
        One of them with a value, for messages.
    """

    example_target: ClassVar[str] = "ratio=0.5"

    @model_validator(mode="after")
    def _one_target(self) -> TargetOptions:
        given, targets = self._given(), self.targets()
        if not given:
            options = ", ".join(name for name in targets if self.rounds or name != "share_per_round")
            raise ValueError(f"no target: give exactly one of {options}, e.g. pruner.{self.example_target}")
        if unknown := [name for name in given if name not in targets]:
            raise ValueError(f"{unknown[0]}: is no target of {self.name}; give one of {', '.join(targets)}")
        if len(given) > 1:
            # The last one is most likely meant: a pruner's defaults state a ratio, the first of them.
            keep = given[-1]
            clear = " ".join(f"pruner.{name}=null" for name in given if name != keep)
            both = " and ".join(given)
            raise ValueError(f"{both} are both targets: give exactly one; for {keep}, add {clear} to the command")
        return self

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """Return the options that may state the target."""
        return tuple(name for name in TARGET_OPTIONS if name in cls.model_fields)

    @property
    def target_option(self) -> str:
        """Name of the option that is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in TARGET_OPTIONS if getattr(self, name, None) is not None]


def check_ratio(ratio: object) -> object:
    """Return a ratio, or a list or mapping of them, with names as text; raise ValueError for one not in (0, 1).

    Examples
    --------
    >>> check_ratio({1: 0.5})
    {'1': 0.5}
    """
    if isinstance(ratio, Mapping):
        ratio = {str(layer): value for layer, value in ratio.items()}
    for value in _leaves(ratio):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            found = "" if value is ratio else f"; found {value!r}"
            raise ValueError(f"must be in (0, 1), the share to remove{found}")
    return ratio


Ratio = Annotated[PerLayerRatio | None, BeforeValidator(check_ratio)]
# Published targets may be named by a number: pruner.variant=41 arrives as one.
VariantName = Annotated[str | None, BeforeValidator(lambda name: str(name) if isinstance(name, int) else name)]


class ChannelOptions(TargetOptions):
    """Options of a pruner of channels.

    With ``ranking=layer``, the ratio is that of every layer, and how wide each remains follows from the options. With
    ``ranking=global``, all channels are ranked together, and it follows from their scores.

    Attributes
    ----------
    attention : {"heads", "widths"}
        What goes of attention: whole heads, or the same dimensions in all heads.
    approximate : bool
        With ``scope=all``, also channels that a layer norm normalises together: the others' statistics change.
    """

    scope: Literal["inner", "all"] = "inner"
    attention: Literal["heads", "widths"] = "heads"
    approximate: bool = False
    ranking: Literal["layer", "global"] = "layer"
    ratio: Ratio = None
    variant: str | None = None
    widths: Widths | None = None
    target_macs: Positive | None = None
    target_params: Positive | None = None
    skip: tuple[str, ...] = ()
    min_channels: Count = 1
    min_share: Share = 0.0
    round_to: Count = 1

    @field_validator("widths", mode="before")
    @classmethod
    def _widths_are_counts(cls, widths: object) -> object:
        if widths is not None and not isinstance(widths, Sequence | Mapping):
            raise ValueError("must be a list of widths in network order, or a mapping from layer to width")
        for value in _leaves(widths):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"must hold whole numbers from 1; found {value!r}")
        return widths

    @model_validator(mode="after")
    def _options_fit_the_target(self) -> ChannelOptions:
        if self.approximate and self.scope != "all":
            raise ValueError("approximate=true: is about channels that additions tie, which pruner.scope=all prunes")
        option, bounds = self.target_option, ("skip", "min_channels", "min_share", "round_to")
        ignored = [name for name in bounds if getattr(self, name) != type(self).model_fields[name].default]
        if option in ("variant", "widths") and ignored:
            raise ValueError(f"{' and '.join(ignored)}: of no use with {option}, which gives every width itself")
        if self.ranking == "global" and isinstance(self.ratio, list | dict):
            raise ValueError("ranking=global takes one ratio for all layers; for one per layer, pruner.ranking=layer")
        return self

    @property
    def decides_widths(self) -> bool:
        """Whether these options alone decide how wide each layer remains."""
        return self.ranking == "layer" or self.target_option in ("variant", "widths")


class RewindConfig(Frozen):
    """How far tickets go back.

    Attributes
    ----------
    epoch : float
        ``weight_rewind`` takes the unpruned network's weights after so many epochs; below 1, a share of
        ``recipe.epochs``.
    length : float
        ``lr_rewind`` trains for the last so many epochs of the schedule; likewise.
    """

    epoch: NonNegative = 0.1
    length: Positive = 0.5

    @field_validator("epoch", "length")
    @classmethod
    def _whole_epochs(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be whole epochs, or below 1 a share of recipe.epochs")
        return value


Probability = Annotated[float, Field(ge=0, le=1)]


class TransferConfig(RatedPhase):
    """A second task that starts from the networks of a study: detection, on which pictures and by which detector.

    Attributes
    ----------
    name : str
        ``voc`` or ``digit_scenes``.
    entries : tuple of str or None
        What is transferred: ``unpruned``, ``prune_c`` (from ``finetune``), ``prune_d``, or any other arm of the study;
        None: all of them.
    root : str or None
        Folder in VOC layout; None downloads VOC 2007 to ``datasets``.
    train_limit, test_limit : int or None
        Use so many pictures of a folder, drawn once for all studies.
    scenes, test_scenes, picture_size : int
        Of ``digit_scenes``: how many, and their pixels a side.
    min_size, max_size : int
        Pixels of the shorter side that pictures are resized to, and the most that the longer one may get.
    stride, body, head, region_size
        See :func:`rethink_prune.detection.split.split_classifier`.
    frozen_stages : int
        Convolutions of so many of the largest output sizes keep their weights.
    anchor_sizes, anchor_ratios : tuple of float
        In pixels of the resized picture; heights over widths.
    proposal_channels : int
        Outputs of the convolution that finds regions.
    proposals_train, proposals_test : tuple of int
        Proposals before and after suppression.
    regions : int
        Sampled from a picture in training.
    score_threshold : float
        Detections of a lower score are left out.
    batch_size : int
        Pictures in a step, of all processes together.
    clip_norm : float or None
        Largest norm of the gradients.
    flip : bool
        Train on every picture and on its mirror image.
    """

    name: Literal["voc", "digit_scenes"]
    entries: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    root: str | None = None
    train_limit: Count | None = None
    test_limit: Count | None = None
    scenes: Count = 400
    test_scenes: Count = 200
    picture_size: int = Field(96, ge=64, le=1024)
    min_size: Count = 600
    max_size: Count = 1000
    stride: Count = 16
    body: str | None = None
    head: str | None = None
    region_size: Count = 7
    frozen_stages: int = Field(2, ge=0)
    anchor_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128.0, 256.0, 512.0)
    anchor_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    proposal_channels: Count = 512
    proposals_train: tuple[Count, Count] = (12_000, 2_000)
    proposals_test: tuple[Count, Count] = (6_000, 300)
    regions: Count = 128
    score_threshold: Probability = 0.0
    batch_size: Count = 1
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive | None = None
    flip: bool = True

    @model_validator(mode="after")
    def _scenes_have_no_files(self) -> TransferConfig:
        for option, advice in (("root", ""), ("train_limit", "; set scenes"), ("test_limit", "; set test_scenes")):
            if self.name == "digit_scenes" and getattr(self, option) is not None:
                raise ValueError(f"{option}: of no use with digit_scenes, which are made and not read{advice}")
        return self


class StudyConfig(Frozen):
    """One study: one dataset, model, pruner, budget and seed, run through its arms."""

    dataset: DatasetConfig
    model: ModelConfig
    pruner: PrunerOptions
    recipe: RecipeConfig
    budget: BudgetConfig
    arms: tuple[str, ...]
    transfer: TransferConfig | None = None
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda|cuda:\d+)$")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerate: Literal["auto", "compile", "off"] = "auto"
    together: Literal["auto"] | Count = "auto"
    deterministic: bool = False
    sync_batchnorm: bool = True
    dry_run: bool = False
    store: StoreConfig
    large: LargeConfig = LargeConfig()
    rewind: RewindConfig = RewindConfig()
    tracker: tuple[str, ...] = ()

    @field_validator("together", mode="before")
    @classmethod
    def _trainings_are_counted(cls, together: object) -> object:
        if together != "auto" and (not isinstance(together, int) or isinstance(together, bool) or together < 1):
            raise ValueError("must be auto or a number from 1")
        return together

    @field_validator("tracker")
    @classmethod
    def _trackers_are_known(cls, tracker: tuple[str, ...]) -> tuple[str, ...]:
        for name in tracker:
            if name not in TRACKERS and ":" not in name:
                own = "your own: path.to.module:Class"
                raise ValueError(f"{name}: no such tracker ({own}); {suggestion(name, TRACKERS)}")
        if len(set(tracker)) < len(tracker):
            raise ValueError("a tracker is named twice")
        return tracker

    @model_validator(mode="after")
    def _rewinds_within_the_training(self) -> StudyConfig:
        epochs = self.recipe.epochs
        if self.rewind.epoch >= epochs:
            raise ValueError(f"rewind.epoch={self.rewind.epoch:g}: must be before the end, recipe.epochs={epochs}")
        if self.rewind.length > epochs:
            raise ValueError(f"rewind.length={self.rewind.length:g}: is longer than recipe.epochs={epochs}")
        return self

    @field_validator("transfer", mode="before")
    @classmethod
    def _none_is_a_choice(cls, transfer: object) -> object:
        return None if transfer == {"name": "none"} else transfer

    @field_validator("arms")
    @classmethod
    def _arms_differ(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if not arms:
            raise ValueError("no arm to run; e.g. arms=[finetune,scratch_e,scratch_b]")
        if len(set(arms)) < len(arms):
            raise ValueError(f"{next(arm for arm in arms if arms.count(arm) > 1)} is named twice")
        return arms


def parse_config(
    tree: Mapping[str, Any],
    *,
    pruner_options: Callable[[str], type[PrunerOptions]],
    check_arm: Callable[[str], object],
) -> StudyConfig:
    """Validate a composed and resolved tree.

    Parameters
    ----------
    tree : mapping
        Plain containers, as ``OmegaConf.to_container`` gives them.
    pruner_options : callable
        Gives the class of a pruner's options by the pruner's name; raises `UserError` for an unknown one.
    check_arm : callable
        Raises `UserError` for the name of no arm.

    Raises
    ------
    UserError
        With one line per error, whatever their number.
    """
    tree = dict(tree)
    problems: list[str] = []
    pruner = tree.get("pruner")
    if isinstance(pruner, Mapping) and isinstance(pruner.get("name"), str):
        try:
            # Parsed apart, because its class depends on its name; a parsed part goes through unchanged below.
            tree["pruner"] = parse_pruner(pruner, pruner_options(pruner["name"]))
        except UserError as error:
            problems.append(str(error))
            # Stands in for what is wrong: the other parts are still to be checked.
            tree["pruner"] = PrunerOptions(name=pruner["name"])
    named = tree.get("arms")
    for name in named if isinstance(named, list) else []:
        try:
            check_arm(str(name))
        except UserError as error:
            problems.append(f"arms={_show(named)}: {error}")
    try:
        config = _parse_part(StudyConfig, tree)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    recommended = getattr(config.recipe.strengths, config.pruner.name, None)
    filled = config.pruner.with_strength(recommended, network=config.model.name, dataset=config.dataset.name)
    return config.model_copy(update={"pruner": filled})


def parse_pruner(tree: Mapping[str, Any], options: type[Part]) -> Part:
    """Return a pruner's options; raise `UserError` with one line per error.

    Examples
    --------
    >>> parse_pruner({"name": "l1", "ratio": 0.5}, ChannelOptions).ratio
    0.5
    """
    return _parse_part(options, tree, "pruner")


def _parse_part(part: type[Part], tree: Mapping[str, Any], *path: str) -> Part:
    try:
        return part.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_line(detail, path, part) for detail in error.errors())) from None


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from value
    elif value is not None:
        yield value


def _line(detail: ErrorDetails, prefix: tuple[str, ...], root: type[Frozen]) -> str:
    """Say in one line what is wrong: ``pruner.ratio=1.2: must be in (0, 1)``."""
    location = [str(part) for part in (*prefix, *detail["loc"]) if not str(part).startswith(("function-", "union"))]
    path = ".".join(location) or "configuration"
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "missing":
            return f"{path}: missing"
        case "extra_forbidden":
            return f"{path}: unknown key; {suggestion(location[-1], _known_keys(root, detail['loc'][:-1]))}"
        case "model_type" | "model_attributes_type":
            return f"{path}={_show(detail['input'])}: must be a group of keys"
        case "string_pattern_mismatch" if location == ["device"]:
            message = "must be auto, cpu, cuda or cuda:N"
    message = (message[:1].lower() + message[1:]).replace("input should", "must").replace("'", "")
    for python, yaml in (("valid tuple", "list"), ("valid list", "list"), ("valid dictionary", "mapping")):
        message = message.replace(python, yaml)
    if isinstance(detail["input"], Mapping) and detail["type"] == "value_error":
        return f"{path}: {message}" if location else message
    return f"{path}={_show(detail['input'])}: {message}"


def _known_keys(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    model: Any = root
    for part in location:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _show(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return "null" if value is None else str(value).replace("'", "")
