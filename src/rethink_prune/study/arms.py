"""The arms: ways to get a trained network to compare. Everything about one is its entry here; a new arm is one more.

Some arms take a length, which stands behind their name: ``retrain@12``, ``scratch@0.25x``. :func:`arm_of` reads names.

The last of them are *tickets* (Frankle and Carbin 2019, *The Lottery Ticket Hypothesis*, arXiv:1803.03635): the pruned
network with weights that the unpruned one had earlier, and their controls.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rethink_prune.errors import UserError, suggestion


@dataclass(frozen=True)
class Epochs:
    """A length as typed: so many epochs."""

    count: int


@dataclass(frozen=True)
class Share:
    """A length as typed: the large network's epochs times a factor, rounded down."""

    factor: float


# The epochs of the large network's recipe; those of fine-tuning; those in which the pruned network uses the large one's
# computation; those that the end of the large network's schedule is replayed for (``rewind.length``).
Rule = Literal["large", "finetune", "scratch_b", "rewind"]
# What an arm starts from: the weights that pruning left; newly drawn ones; those the unpruned network started from
# (`initial`), or had after ``rewind.epoch`` epochs (`early`).
Weights = Literal["inherited", "fresh", "initial", "early"]


@dataclass(frozen=True)
class Total:
    """As many epochs from scratch as fit into what retraining for `retrained` costs, its ancestors included.

    With a teacher, what retraining with the teacher costs.
    """

    retrained: Epochs | Share | Rule


Length = Epochs | Share | Rule | Total

_DASH_DOTS = (0, (5, 1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Style:
    """How a network's curve is drawn: told apart with any colour vision, and in black and white.

    Attributes
    ----------
    color : str
        Of Okabe and Ito's palette, or of Tol's muted one, in hexadecimal.
    dashes : str or tuple
        A line style of matplotlib.
    marker : str
        A marker of matplotlib.
    """

    color: str
    dashes: str | tuple[int, tuple[int, ...]]
    marker: str


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes
    ----------
    network : {"pruned", "large"}
        Which architecture it trains.
    weights : {"inherited", "fresh", "initial", "early"}
        What it starts from.
    length : Length, optional
        How long it trains. ``finetune`` also means the learning rate and schedule of ``recipe.finetune``, and
        ``rewind`` the end of the recipe's schedule; the others train with the whole of it. None: the length has to
        stand behind the arm's name, as in ``retrain@12``.
    title : str
        What a table's column is called.
    name : str
        What it is called in a sentence.
    meaning : str
        What it is, for readers who do not know it.
    style : Style
        How its curve is drawn. No two entries may share a colour, dashes or a marker; those of the networks that are no
        arm are in ``report/networks.py``. One entry with several lengths has one style.
    taught : bool
        Whether it learns from the unpruned network as well as from the labels, see ``training/distillation.py``.
    takes_length : bool
        Whether another length may stand behind its name.
    shuffled : bool
        Whether what stays is drawn at random, as much in each layer as the pruner leaves.
    """

    network: Literal["pruned", "large"]
    weights: Weights
    length: Length | None
    title: str
    name: str
    meaning: str
    style: Style
    taught: bool = False
    takes_length: bool = False
    shuffled: bool = False

    @property
    def follows_training(self) -> bool:
        """Whether it needs a network that was trained and pruned, even where the architecture is known without."""
        return self.network == "pruned" and self.weights != "fresh" and not self.shuffled


ARMS: Mapping[str, Arm] = {
    "finetune": Arm(
        network="pruned",
        weights="inherited",
        length="finetune",
        title="fine-tuned",
        name="fine-tuning",
        meaning="the pruned network, trained further from the weights that pruning left",
        style=Style("#E69F00", "-", "o"),
    ),
    "scratch_e": Arm(
        network="pruned",
        weights="fresh",
        length="large",
        title="Scratch-E",
        name="Scratch-E",
        meaning="the pruned architecture with new random weights, for as many epochs as the unpruned network",
        style=Style("#56B4E9", "--", "^"),
    ),
    "scratch_b": Arm(
        network="pruned",
        weights="fresh",
        length="scratch_b",
        title="Scratch-B",
        name="Scratch-B",
        meaning="the same for as much computation as the unpruned network's training, so for more epochs",
        style=Style("#0072B2", "-.", "D"),
    ),
    # The control: does the unpruned network gain as much from Scratch-B's epochs?
    "large_longer": Arm(
        network="large",
        weights="fresh",
        length="scratch_b",
        title="unpruned, longer",
        name="unpruned, longer",
        meaning="the unpruned network for Scratch-B's epochs",
        style=Style("#999999", _DASH_DOTS, "v"),
    ),
    # These two differ in nothing but what they start from.
    "retrain": Arm(
        network="pruned",
        weights="inherited",
        length=None,
        title="retrained",
        name="retraining",
        meaning="the pruned network, trained from the weights that pruning left with the unpruned network's recipe",
        style=Style("#D55E00", (0, (8, 2)), "<"),
    ),
    "scratch": Arm(
        network="pruned",
        weights="fresh",
        length=None,
        title="from scratch",
        name="training from scratch",
        meaning="the pruned architecture with new random weights, trained with the unpruned network's recipe",
        style=Style("#332288", (0, (4, 1)), ">"),
    ),
    # The same three with the unpruned network as a teacher: today's pipelines retrain that way.
    "finetune_kd": Arm(
        network="pruned",
        weights="inherited",
        length="finetune",
        title="fine-tuned, taught",
        name="fine-tuning with a teacher",
        meaning="the pruned network, trained further with the unpruned network as its teacher",
        style=Style("#DDCC77", (0, (8, 2, 1, 2)), "p"),
        taught=True,
    ),
    "retrain_kd": Arm(
        network="pruned",
        weights="inherited",
        length=None,
        title="retrained, taught",
        name="retraining with a teacher",
        meaning="as retrained, with the unpruned network as a teacher",
        style=Style("#882255", (0, (5, 2, 2, 2)), "h"),
        taught=True,
    ),
    "scratch_kd": Arm(
        network="pruned",
        weights="fresh",
        length=None,
        title="from scratch, taught",
        name="training from scratch with a teacher",
        meaning="as from scratch, with the unpruned network as a teacher",
        style=Style("#44AA99", (0, (3, 1, 1, 1, 1, 1, 1, 1)), "*"),
        taught=True,
    ),
    # Tickets. All but `lr_rewind` train as Scratch-E does, unless a length says otherwise.
    "lottery": Arm(
        network="pruned",
        weights="initial",
        length="large",
        title="ticket",
        name="the lottery ticket",
        meaning="the pruned network with the weights that the unpruned one started from, where they remain",
        style=Style("#117733", (0, (1, 2)), "H"),
        takes_length=True,
    ),
    "lottery_b": Arm(
        network="pruned",
        weights="initial",
        length="scratch_b",
        title="ticket, Scratch-B's length",
        name="the lottery ticket for Scratch-B's epochs",
        meaning="the ticket for as much computation as the unpruned network's training",
        style=Style("#88CCEE", (0, (2, 2)), "8"),
    ),
    "weight_rewind": Arm(
        network="pruned",
        weights="early",
        length="large",
        title="rewound",
        name="rewinding weights",
        meaning="the pruned network with the weights that the unpruned one had after rewind.epoch epochs",
        style=Style("#AA4499", (0, (6, 1, 1, 1)), "1"),
        takes_length=True,
    ),
    "lr_rewind": Arm(
        network="pruned",
        weights="inherited",
        length="rewind",
        title="learning rate rewound",
        name="rewinding the learning rate",
        meaning="the pruned network, trained further through the last rewind.length of the unpruned one's schedule",
        style=Style("#CC6677", (0, (9, 1)), "2"),
    ),
    "reshuffle": Arm(
        network="pruned",
        weights="initial",
        length="large",
        title="random ticket",
        name="a random ticket",
        meaning="the ticket of as many channels or weights in each layer, drawn at random",
        style=Style("#999933", (0, (2, 1, 1, 1, 1, 2)), "3"),
        takes_length=True,
        shuffled=True,
    ),
}

# The arm that the training between two rounds is, by ``pruner.between_rounds``.
BETWEEN_ROUNDS: Mapping[str, str] = {"init": "lottery", "epoch": "weight_rewind", "none": "finetune"}

TOTAL = "total:"
_SHARE = re.compile(r"(\d+\.?\d*|\.\d+)x")
_LENGTHS = f"an epoch count (12), a share of recipe.epochs (0.25x), e, b, or with scratch {TOTAL}12, {TOTAL}finetune"
_MOST_EPOCHS = 10**9


def arm_of(name: str) -> Arm:
    """Return the arm of a name as it stands in ``arms``, with its length.

    Raises
    ------
    UserError
        If there is no such arm, or what stands behind ``@`` is no length of it.

    Examples
    --------
    >>> arm_of("retrain@12").length, arm_of("scratch@e").length, arm_of("scratch@total:0.5x").length
    (Epochs(count=12), 'large', Total(retrained=Share(factor=0.5)))
    >>> arm_of("retrain@12").title, arm_of("retrain@12").name
    ('retrained @12', 'retraining for 12 epochs')
    """
    base, at, text = name.partition("@")
    entry = ARMS.get(base)
    if entry is None:
        raise UserError(f"no arm {name}; {suggestion(base, map(arm_form, ARMS))}")
    if entry.length is not None and not at:
        return entry
    if entry.length is not None and not entry.takes_length:
        raise UserError(f"{name}: the length of {base} is given; leave out @{text}, or take {_with_length()}")
    if not text:
        raise UserError(f"{name}: needs a length: {base}@N, where N is {_LENGTHS}")
    length = _parse_length(text, name)
    if isinstance(length, Total) and entry.weights == "inherited":
        raise UserError(
            f"{name}: {TOTAL} is for scratch arms, which it gives what retraining costs in total; "
            f"take {base}@{text.removeprefix(TOTAL)}"
        )
    title, duration = f"{entry.title} @{text}", f"for {_length_words(length)}"
    meaning = f"{entry.meaning}, {duration}"
    return replace(entry, length=length, title=title, name=f"{entry.name} {duration}", meaning=meaning)


def known_arm(name: str) -> Arm | None:
    """Return the arm of a name; None if it is none, such as one of a later version.

    Examples
    --------
    >>> known_arm("arm_of_a_later_version") is None
    True
    """
    try:
        return arm_of(name)
    except UserError:
        return None


def arm_form(base: str) -> str:
    """Return how an entry of `ARMS` is asked for.

    Examples
    --------
    >>> arm_form("finetune"), arm_form("retrain"), arm_form("lottery")
    ('finetune', 'retrain@N', 'lottery[@N]')
    """
    entry = ARMS[base]
    return f"{base}@N" if entry.length is None else f"{base}[@N]" if entry.takes_length else base


def file_name(name: str) -> str:
    """Return an arm's name as part of the name of a file, a folder or a TensorBoard run.

    Examples
    --------
    >>> file_name("scratch@total:4")
    'scratch@total-4'
    """
    return name.replace(":", "-")


def draws_anew(arms: Iterable[str]) -> bool:
    """Tell whether one of these arms draws the weights of a pruned network anew.

    Examples
    --------
    >>> draws_anew(["finetune"]), draws_anew(["finetune", "scratch_e"])
    (False, True)
    """
    return any(arm_of(name).weights == "fresh" for name in arms)


def _parse_length(text: str, name: str) -> Length:
    inner = text.removeprefix(TOTAL)
    length = _parse_plain_length(inner, name, known={"finetune"} if text.startswith(TOTAL) else set())
    return Total(length) if text.startswith(TOTAL) else length


def _parse_plain_length(text: str, name: str, known: set[str]) -> Epochs | Share | Rule:
    rules: Mapping[str, Rule] = {"e": "large", "b": "scratch_b", "finetune": "finetune"}
    if text in {"e", "b", *known}:
        return rules[text]
    # No other digits than these: Python's int() takes those of any script.
    if text.isascii() and text.isdigit():
        if not 1 <= int(text) <= _MOST_EPOCHS:
            raise UserError(f"{name}: {text} epochs: must be from 1 to {_MOST_EPOCHS:,}")
        return Epochs(int(text))
    if (found := _SHARE.fullmatch(text)) and text.isascii():
        factor = float(found[1])
        if factor == 0 or not math.isfinite(factor):
            raise UserError(f"{name}: {text}: must be above 0, a share of recipe.epochs such as 0.25x")
        return Share(factor)
    raise UserError(f"{name}: {text or 'nothing'} is no length; a length is {_LENGTHS}")


def _with_length() -> str:
    return " or ".join(f"{base}@N" for base, entry in ARMS.items() if entry.length is None or entry.takes_length)


def _length_words(length: Length) -> str:
    match length:
        case Epochs(count):
            return f"{count:,} epoch{'s' if count > 1 else ''}"
        case Share(factor):
            return f"{factor:g} times the unpruned network's epochs"
        case Total(retrained):
            return f"the total computation of retraining for {_length_words(retrained)}"
        case "large":
            return "the unpruned network's epochs"
        case "finetune":
            return "fine-tuning's epochs"
        case "scratch_b":
            return "the unpruned network's computation"
        case "rewind":
            return "the end of the unpruned network's schedule"
