"""Gathering: the runs below folders, in stores, and in the ``results.json`` of earlier reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE
from rethink_prune.store.metrics import read_metrics

FORMAT = "rethink-prune results"
FORMAT_VERSION = 1
BASES = ("large", "sparse")


def printable(text: str) -> str:
    """Return `text` with a question mark for each character that no page can show, such as control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    """Return nested values with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return _number(value)


def _whole_curve(value: Any) -> Any:
    return None if isinstance(value, list | tuple) and None in _finite(value) else value


Text = Annotated[str, AfterValidator(printable)]
# NaN and infinity count as missing: JSON has neither.
Number = Annotated[float | None, BeforeValidator(_number)]


class Record(BaseModel):
    """Part of a summary; what this version does not know is left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Trained(Record):
    """One trained network of a run: an arm, or the unpruned network.

    Attributes
    ----------
    status : {"done", "failed"}
    reason : str or None
        Why it failed.
    top1, top1_best : float or None
        Percent on the test images: after the last epoch, and of the best epoch.
    train_flops, train_flops_total : float or None
        Its own, and with its ancestors'.
    stage : str or None
        Name of its stage.
    processes : tuple of int
        The different numbers of processes its epochs were trained by; none if that is not known.
    curve : tuple of float or None
        ``top1`` after each epoch, where the stage is still there.
    """

    status: Literal["done", "failed"] = "done"
    reason: Text | None = None
    top1: Number = None
    top1_best: Number = None
    epochs: int | None = None
    params: int | None = None
    macs: int | None = None
    train_flops: Number = None
    train_flops_total: Number = None
    stage: Text | None = None
    processes: tuple[int, ...] = (1,)
    curve: Annotated[tuple[float, ...] | None, BeforeValidator(_whole_curve)] = None

    @property
    def finished(self) -> bool:
        """Whether it has an accuracy to compare."""
        return self.status == "done" and self.top1 is not None


class Layer(Record):
    """Width of a layer before and after pruning."""

    layer: Text
    kept: int
    full: int


class Pruned(Record):
    """The pruned network before any retraining."""

    params: int | None = None
    macs: int | None = None
    top1: Number = None
    stage: Text | None = None
    layers: tuple[Layer, ...] = ()


class Ledger(Record):
    """What the budget was worked out from."""

    macs_reference: int | None = None


class Study(Record):
    """What was asked for."""

    experiment: Text | None = None
    dataset: Text
    model: Text
    pruner: Text
    target: Annotated[dict[str, Any], BeforeValidator(_finite)]
    recipe: Text
    budget: Text
    seed: int
    device: Text = ""
    precision: Text = ""
    train_images: int | None = None
    test_images: int | None = None
    arms: tuple[Text, ...] = ()
    settings: Annotated[dict[str, Any] | None, BeforeValidator(_finite)] = None
    versions: dict[Text, Text] = Field(default_factory=dict)
    ledger: Ledger = Ledger()


class Run(Record):
    """One run: a summary, and the name of its folder.

    Attributes
    ----------
    name : str
        The folder as it was found, without what leads to the place that was searched.
    """

    name: Text
    study: Study
    large: Trained | None = None
    sparse: Trained | None = None
    pruned: Pruned | None = None
    arms: dict[Text, Trained] = Field(default_factory=dict)

    @property
    def trained(self) -> dict[str, Trained]:
        """Everything trained so far, by name: the unpruned networks and the arms."""
        bases = {name: entry for name in BASES if (entry := getattr(self, name)) is not None}
        return {**bases, **self.arms}


@dataclass
class Gathered:
    """The runs that were found, and in words what could not be used."""

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def gather(places: Iterable[Path]) -> Gathered:
    """Return the runs in the given places, each once; unfinished ones too.

    Parameters
    ----------
    places : iterable of Path
        Run folders, folders that hold some at any depth, stores, or the ``results.json`` of earlier reports.

    Raises
    ------
    UserError
        If a place is missing or holds no run, or no run at all can be read.
    """
    gathered = Gathered()
    seen: set[Path] = set()
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such folder")
        if place.is_file():
            gathered.runs += _published(place)
        elif (place / "stages").is_dir() and (place / "runs").is_dir():
            _gather_store(place, gathered, seen)
        else:
            files = sorted(place.rglob(SUMMARY_FILE))
            if not files:
                raise UserError(f"{place}: holds no {SUMMARY_FILE}; give run folders, folders of runs, or a store")
            for file in files:
                _gather_file(file, _short(file.parent, place), gathered, seen)
    if not gathered.runs:
        raise UserError("\n".join(gathered.problems or ["no run was found"]))
    return gathered


def _gather_store(store: Path, gathered: Gathered, seen: set[Path]) -> None:
    records = sorted(path for path in (store / "runs").glob("*.json") if path.name[0] != ".")
    if not records:
        raise UserError(f"{store}: no run was recorded in this store")
    lost = 0
    for path in records:
        try:
            record = json.loads(path.read_text())
            file = Path(record["run_dir"]) / SUMMARY_FILE
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            gathered.problems.append(f"{path}: left out: is damaged ({error})")
            continue
        name = "/".join(file.parent.parts[-3:])
        if file.is_file():
            _gather_file(file, name, gathered, seen, stages=store / "stages")
        elif "summary" in record:
            _gather_summary(record["summary"], path, name, gathered, stages=store / "stages")
        else:
            lost += 1
    if lost:
        gathered.problems.append(
            f"{store}: left out {lost} runs whose folders are gone: an older version recorded them without their "
            "summary; run their commands again, finished stages are reused"
        )


def _gather_file(file: Path, name: str, gathered: Gathered, seen: set[Path], *, stages: Path | None = None) -> None:
    if file.resolve() in seen:
        return
    seen.add(file.resolve())
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        gathered.problems.append(f"{file}: left out: is damaged ({error})")
        return
    _gather_summary(content, file, name, gathered, stages=stages)


def _gather_summary(content: Any, file: Path, name: str, gathered: Gathered, *, stages: Path | None) -> None:
    try:
        gathered.runs.append(Run.model_validate(_with_curves({**content, "name": name}, stages)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        gathered.problems.append(
            f"{file}: left out: {where}: {first['msg']}; if an older version made it, run its command again: "
            "finished stages are reused"
        )
    except (TypeError, AttributeError):
        gathered.problems.append(f"{file}: left out: is no summary of a run")


def _published(file: Path) -> Iterator[Run]:
    """Yield the runs in a ``results.json``, or in a list of summaries as earlier versions wrote it."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        if content.get("version") != FORMAT_VERSION:
            raise UserError(f"{file}: has version {content.get('version')}; this is for version {FORMAT_VERSION}")
        content = content.get("runs")
    if not isinstance(content, list):
        raise UserError(f"{file}: is not the results.json of a report; give run folders, folders of runs, or a store")
    for number, run in enumerate(content):
        try:
            yield Run.model_validate({"name": f"{file.name}#{number}", **run})
        except (ValidationError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: run {number} cannot be read: {reason}") from None


def _with_curves(content: dict[str, Any], stages: Path | None) -> dict[str, Any]:
    """Return a summary with each training's curve, and with names of stages instead of their folders."""
    arms = content.get("arms") or {}
    entries = {name: content[name] for name in (*BASES, "pruned") if content.get(name)}
    return {
        **content,
        **{name: _with_curve(entry, stages) for name, entry in entries.items()},
        "arms": {name: _with_curve(entry, stages) for name, entry in arms.items()},
    }


def _with_curve(entry: Mapping[str, Any], stages: Path | None) -> dict[str, Any]:
    if not entry.get("stage"):
        return dict(entry)
    folder = Path(entry["stage"])
    if not folder.is_dir() and stages is not None:
        folder = stages / folder.name
    try:
        curve = [row["test_top1"] for row in read_metrics(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        curve = []  # damaged: a picture has one line less; the numbers are the summary's
    return {**entry, "stage": folder.name, "curve": curve if curve and all(map(math.isfinite, curve)) else None}


def _short(folder: Path, place: Path) -> str:
    """Return a run's folder, beginning with the place it was found in but without what leads to that."""
    inside = folder.relative_to(place)
    return (Path(place.resolve().name) / inside).as_posix()
