"""Find the runs below folders, in stores, and in the ``results.json`` of earlier reports."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from rethink_prune.errors import UserError
from rethink_prune.files import DETECTIONS_FILE, SUMMARY_FILE
from rethink_prune.report.networks import has_pruned_positions
from rethink_prune.report.records import RunRecord
from rethink_prune.store.metrics import read_metrics

FORMAT = "rethink-prune results"
FORMAT_VERSION = 1

# What reading a damaged JSON file raises; the last one if its brackets are nested too deeply.
_UNREADABLE = (OSError, ValueError, RecursionError)

# Of more runs, a report has no curves, no masks, and few pictures.
DETAILED_RUNS = 1_000


@dataclass
class GatheredRuns:
    """The runs that were found, and in words what could not be used; `curves` and `masks` say whether to read them.

    `detections` has the pictures with what detectors found, by stage, where the stages are still there, and `stages`
    the folders of those.
    """

    runs: list[RunRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    detections: dict[str, Path] = field(default_factory=dict)
    stages: dict[str, Path] = field(default_factory=dict)
    curves: bool = True
    masks: bool = False
    _files: set[Path] = field(default_factory=set)

    def add(self, file: Path, name: str, *, stages: Path | None = None, summary: Any = None) -> None:
        """Add the run of a ``summary.json``, unless that file was added before.

        Parameters
        ----------
        stages
            A folder that may also hold its stages.
        summary
            The content, where a store kept it in `file`.
        """
        if summary is None:
            # The places may overlap: a store, and the folder of its runs.
            if file.resolve() in self._files:
                return
            self._files.add(file.resolve())
        try:
            content = _read_json(file) if summary is None else summary
            whole = _with_curves({**content, "name": name}, stages, read=self.curves)
            if self.masks and content.get("pruned"):
                whole["pruned"] = {**whole["pruned"], "kernels": _kept_kernels(content, stages)}
            self.runs.append(RunRecord.model_validate(whole))
            self.detections |= _stage_pictures(content, stages)
            folders = [_stage_folder(stage, stages) for stage in _named_stages(content)]
            self.stages |= {folder.name: folder for folder in folders if folder.is_dir()}
        except ValidationError as error:
            # The first error is enough to find the file's fault; the others often follow from it.
            advice = "if an older version made it, run its command again: finished stages are reused"
            self.leave_out(file, f"{_first_error(error)}; {advice}")
        except _UNREADABLE as error:
            self.leave_out(file, f"is damaged ({error})")
        except (TypeError, AttributeError):
            self.leave_out(file, "is no summary of a run")

    def leave_out(self, file: Path, why: str) -> None:
        """Record that a file could not be used."""
        self.problems.append(f"{file}: left out: {why}")


def gather(places: Sequence[Path], *, masks: bool = False, most_detailed: int | None = None) -> GatheredRuns:
    """Return the runs in the given places, each once; unfinished ones too.

    Parameters
    ----------
    places
        Run folders, folders that hold some at any depth, stores, or the ``results.json`` of earlier reports.
    masks
        Also read which kernel positions remain, where the stages are still there: files as large as the networks.
    most_detailed
        Of more runs, read neither curves nor masks.

    Raises
    ------
    UserError
        If a place is missing or holds no run, or no run at all can be read.
    """
    missing = next((place for place in places if not place.exists()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such folder; run a study first, or name runs or a store")
    found = [(place, _files_of_runs(place)) for place in places]
    detailed = most_detailed is None or sum(len(files) for _, files in found) <= most_detailed
    gathered = GatheredRuns(curves=detailed, masks=masks and detailed)
    for place, files in found:
        if place.is_file():
            gathered.runs += _read_results(place)
        elif _is_store(place):
            _read_records(place, files, gathered)
        else:
            for file in files:
                # The resolved name: a place may be "." or "..".
                inside = Path(place.resolve().name) / file.parent.relative_to(place)
                gathered.add(file, inside.as_posix())
    if not gathered.runs:
        raise UserError("\n".join(gathered.problems or ["no run was found"]))
    return gathered


def _is_store(place: Path) -> bool:
    return (place / "stages").is_dir() and (place / "runs").is_dir()


def _files_of_runs(place: Path) -> list[Path]:
    """Return a file for each run of a place: the records of a store, or summaries; that of a report has any number."""
    if place.is_file():
        return [place]
    # Sorted: the order in which a file system lists a folder differs from machine to machine.
    if _is_store(place):
        # Names with a dot in front are files that are being written.
        records = sorted(path for path in (place / "runs").glob("*.json") if path.name[0] != ".")
        if not records:
            raise UserError(f"{place}: no run was recorded in this store")
        return records
    files = sorted(place.rglob(SUMMARY_FILE))
    if not files:
        raise UserError(f"{place}: holds no {SUMMARY_FILE}; give run folders, folders of runs, or a store")
    return files


def _read_records(store: Path, records: Iterable[Path], gathered: GatheredRuns) -> None:
    lost = 0
    for path in records:
        try:
            # Several times as fast as the module json; but numbers that are not finite would stay.
            file = Path(from_json(path.read_bytes())["run_dir"]) / SUMMARY_FILE
            record = {} if file.is_file() else _read_json(path)
        except (*_UNREADABLE, KeyError, TypeError) as error:
            gathered.leave_out(path, f"is damaged ({error})")
            continue
        # Enough to tell runs apart: Hydra's run folders end with date and time.
        name = "/".join(file.parent.parts[-3:])
        if file.is_file():
            gathered.add(file, name, stages=store / "stages")
        # The store keeps a copy, since run folders are often deleted.
        elif "summary" in record:
            gathered.add(path, name, stages=store / "stages", summary=record["summary"])
        else:
            lost += 1
    if lost:
        why = "an older version recorded them without their summary"
        advice = "run their commands again, finished stages are reused"
        gathered.problems.append(f"{store}: left out {lost} runs whose folders are gone: {why}; {advice}")


def _read_results(file: Path) -> Iterator[RunRecord]:
    """Yield the runs in a ``results.json``, or in a list of summaries as earlier versions wrote it."""
    try:
        content = _read_json(file)
    except _UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        if content.get("version") != FORMAT_VERSION:
            raise UserError(f"{file}: has version {content.get('version')}; this is for version {FORMAT_VERSION}")
        content = content.get("runs")
    if not isinstance(content, list):
        raise UserError(f"{file}: is not the results.json of a report; give run folders, folders of runs, or a store")
    for number, run in enumerate(content):
        try:
            yield RunRecord.model_validate({"name": f"{file.name}#{number}", **run})
        except (ValidationError, TypeError) as error:
            reason = _first_error(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{file}: run {number} cannot be read: {reason}") from None


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _read_json(file: Path) -> Any:
    """Read a JSON file; NaN and infinity become None, since what a report writes has neither."""
    return json.loads(file.read_text(), parse_constant=lambda _: None, parse_float=_finite_float)


def _finite_float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None  # "1e999" is infinite


def _with_curves(content: dict[str, Any], stages: Path | None, *, read: bool) -> dict[str, Any]:
    """Return a summary with names of stages instead of their folders, and if `read` with each training's curve."""
    names = ("large", "sparse", "early", "pruned")
    complete = partial(_with_curve, stages=stages) if read else _with_stage_names
    bases = {name: complete(content[name]) for name in names if content.get(name)}
    parts = {
        part: {name: complete(entry) for name, entry in (content.get(part) or {}).items()}
        for part in ("arms", "unfinished", "transfer")
    }
    rounds = [_with_stage_names(each) for each in content.get("rounds") or ()]
    return {**content, **bases, **parts, "rounds": rounds}


def _stage_folder(stage: str, stages: Path | None) -> Path:
    folder = Path(stage)
    # The store may have moved since the summary was written.
    return stages / folder.name if not folder.is_dir() and stages is not None else folder


def _named_stages(content: Any) -> Iterator[str]:
    """Yield the stages that a summary names, at any depth."""
    for name, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if isinstance(value, Mapping | list):
            yield from _named_stages(value)
        elif name in ("stage", "trained_stage") and value:
            yield value


def _stage_pictures(content: Mapping[str, Any], stages: Path | None) -> dict[str, Path]:
    entries = [entry for entry in (content.get("transfer") or {}).values() if entry.get("stage")]
    files = [_stage_folder(entry["stage"], stages) / DETECTIONS_FILE for entry in entries]
    return {file.parent.name: file for file in files if file.is_file()}


def _kept_kernels(content: Mapping[str, Any], stages: Path | None) -> list[dict[str, Any]]:
    """Return what the masks of a run keep, from the first stage of the pruned network that has its architecture."""
    arms = {name: entry for name, entry in (content.get("arms") or {}).items() if has_pruned_positions(name)}
    for entry in (content["pruned"], *arms.values()):
        if entry.get("stage"):
            file = _stage_folder(entry["stage"], stages) / "architecture.safetensors"
            if file.is_file():
                return read_kernels(file)
    return []


def read_kernels(file: Path) -> list[dict[str, Any]]:
    """Return, for each convolution with masks, the share of its kernels that keep each position.

    Kernels of 1 x 1 have no positions to tell apart. A damaged file has none: no number of the tables rests on it.
    """
    found = []
    try:
        # NumPy's arrays: nothing else here needs torch.
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(name for name in tensors.keys() if name.startswith("masks/")):  # noqa: SIM118 (no dict)
                mask = tensors.get_tensor(name)
                if mask.ndim == 4 and mask[0, 0].size > 1:
                    layer = name.removeprefix("masks/").removesuffix(".weight")
                    found.append({"layer": layer, "kept": mask.mean(axis=(0, 1)).tolist()})
    except (OSError, ValueError, SafetensorError):
        return []
    return found


def _with_stage_names(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Path(value).name if name.endswith("stage") and value else value for name, value in entry.items()}


def _with_curve(entry: Mapping[str, Any], stages: Path | None) -> dict[str, Any]:
    if not entry.get("stage"):
        return dict(entry)
    folder = _stage_folder(entry["stage"], stages)
    try:
        rows = read_metrics(folder)
        # A detector's rows have a measure of their own.
        measure = "test_map" if rows and "test_map" in rows[0] else "test_top1"
        curve = [row[measure] for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        # Damaged metrics cost a picture one line: the numbers of the tables come from the summary.
        curve = []
    return {**entry, "stage": folder.name, "curve": curve if curve and all(map(math.isfinite, curve)) else None}
