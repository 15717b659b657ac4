"""The folder that ``rethink-prune-board`` shows: a chart for each group of seeds, a run for each arm's mean and seeds.

TensorBoard draws a chart per tag and a colour per run, and ticks runs by itself only while they are few. So the group
is in the tag (``resnet20 l1 0.3/accuracy top-1 by epoch``) and the arm in the run (``scratch_b/mean``,
``scratch_b/seed 0``): any number of groups needs few runs, and an arm has one colour in all charts.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

from filelock import FileLock, Timeout

from rethink_prune.errors import UserError, first_line
from rethink_prune.tracking.tensorboard import gflops_step, tag_name

MEAN = "mean"

# What the address opens. For Time series: no smoothing, the means, and one colour for an arm's mean and seeds, and for
# its lengths ("scratch@4", "scratch@8"). For Custom scalars, which alone draws bands: the means.
_OPENING = {"smoothing": "0", "runFilter": f"/{MEAN}$", "runColorGroup": "regex:^([^/@]+)"}
_OPENING_TAB = f"custom_scalars&regexInput={quote(f'/{MEAN}$')}"

RELOAD_SECONDS = 5
# Marks the event files of a board: it removes no others.
_FILE_SUFFIX = ".rethink-prune-board"
_LOCK_FILE = "board.lock"
_LONGEST_NAME = 60  # of a folder; in bytes it may be four times as long

Points = list[tuple[int, float]]
Layout = tuple[tuple[str, int, str], ...]  # of each group the label, the number of seeds, and what is measured


@dataclass(frozen=True)
class BoardCurve:
    """Top-1, or a detector's mAP, in percent after each epoch, of one seed or over several.

    Attributes
    ----------
    epochs
        Done so far.
    flops
        Training FLOPs so far, with those of the ancestors; None if they are not known.
    mean, low, high
        Over the seeds; all the same for one.
    """

    epochs: Sequence[float]
    flops: Sequence[float] | None
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class BoardGroup:
    """The seeds of one study: its arms, or its detectors.

    Attributes
    ----------
    label
        No two groups of a board have the same; without slashes and round brackets.
    seeds
        How many there are.
    measure
        What the curves show, see :func:`tag_name`.
    curves
        By the arm or detector and the name of its curve: `MEAN`, or which seed it is. All groups have the same ones in
        the same order, those without a curve too: it is the order of lists and colours.
    """

    label: str
    seeds: int
    measure: str
    curves: Mapping[str, Mapping[str, BoardCurve]]


class BoardFolder:
    """A folder of event files that follows its groups: it is added to where curves only grew.

    Parameters
    ----------
    folder
        Made if it is missing. What an earlier board left there is removed, nothing else.

    Raises
    ------
    UserError
        If the folder cannot be written, or another board uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / _LOCK_FILE, blocking=False)
        self._runs: dict[str, _RunFile] = {}
        self._numbers = count()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for file in folder.rglob(f"*tfevents*{_FILE_SUFFIX}"):
                file.unlink()
        except Timeout:
            raise UserError(f"--out {folder}: another board uses it; name another folder") from None
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from None

    def write(self, groups: Sequence[BoardGroup]) -> None:
        """Make the folder show `groups`, in their order."""
        wanted = _board_runs(groups)
        layout = tuple((group.label, group.seeds, group.measure) for group in groups)
        for name in set(self._runs) - set(wanted):
            self._runs.pop(name).remove()
        for name, run in wanted.items():
            # One run tells the layout; of several, TensorBoard would show all charts that any of them has.
            first = layout if name == next(iter(wanted)) else None
            old = self._runs.get(name)
            if old is None or not old.continues(run, first):
                path = self.folder / name
                path.mkdir(parents=True, exist_ok=True)
                # Later files of a run replace what earlier ones said: they come later in the order of their names.
                file = path / f"events.out.tfevents.{next(self._numbers):010}{_FILE_SUFFIX}"
                self._runs[name] = _RunFile(file, run.began, first)
                if old is not None:
                    old.remove()
            self._runs[name].add(run.curves)

    def close(self) -> None:
        """Close the files and let another board use the folder."""
        for run in self._runs.values():
            run.close()
        self._lock.release()


def start_tensorboard(folder: Path, port: int) -> str:
    """Start TensorBoard over a folder, for this machine alone; return the address that opens on the answer.

    It ends with this process.

    Raises
    ------
    UserError
        If the port cannot be used.
    """
    from tensorboard import program

    board = program.TensorBoard()
    options = {"logdir": folder, "host": "127.0.0.1", "port": port, "reload_interval": RELOAD_SECONDS}
    board.configure(argv=["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    try:
        # What it says about loading names an option that the user does not have here.
        with redirect_stderr(io.StringIO()):
            address = board.launch()
    except program.TensorBoardServerException as error:
        raise UserError(
            f"--port {port}: cannot be used ({first_line(error)}); name another one, or 0 for any"
        ) from None
    return f"{address}?{urlencode(_OPENING, quote_via=quote)}#{_OPENING_TAB}"


@dataclass(frozen=True)
class _BoardRun:
    """What a run has to show by tag, and its place in TensorBoard's lists: they are sorted by the time it began."""

    began: int
    curves: dict[str, Points]


class _RunFile:
    """The event file of one run."""

    def __init__(self, path: Path, began: int, layout: Layout | None) -> None:
        # Imported here: the other commands do without TensorBoard.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._records = RecordWriter(self._file)
        self._began = began
        self._layout = layout
        self._written: dict[str, Points] = {}
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard forgets what an earlier file of this run said.
        self._write(Event(session_log=SessionLog(status=SessionLog.START)))
        if layout is not None:
            self._write(Event(summary=_layout_summary(layout)))

    def continues(self, run: _BoardRun, layout: Layout | None) -> bool:
        """Tell whether what was written is the beginning of `run`."""
        if (self._began, self._layout) != (run.began, layout):
            return False
        return all(run.curves.get(tag, [])[: len(points)] == points for tag, points in self._written.items())

    def add(self, curves: Mapping[str, Points]) -> None:
        """Write the points that are new."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, points in curves.items():
            for step, value in points[len(self._written.get(tag, ())) :]:
                self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
        # Read at any time: so, together.
        self._file.flush()
        self._written = dict(curves)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)

    def _write(self, event: Any) -> None:
        event.wall_time = self._began
        self._records.write(event.SerializeToString())


def _board_runs(groups: Sequence[BoardGroup]) -> dict[str, _BoardRun]:
    """Return the runs by name: first the means of all arms, then the seeds."""
    arms = list(dict.fromkeys(arm for group in groups for arm in group.curves))
    names = list(dict.fromkeys(name for group in groups for curves in group.curves.values() for name in curves))
    # An arm has its place, and so its colour, whichever other arms and seeds there are.
    places = {(arm, MEAN): place for place, arm in enumerate(arms, 1)}
    for (arm, _), place in list(places.items()):
        places |= {(arm, name): 1000 * place + number for number, name in enumerate(names) if name != MEAN}
    runs: dict[str, _BoardRun] = {}
    for (arm, name), place in places.items():
        curves = [(group, curve) for group in groups if (curve := group.curves.get(arm, {}).get(name))]
        if curves:
            tagged = [_tagged(group, curve) for group, curve in curves]
            points = {tag: points for tags in tagged for tag, points in tags.items()}
            runs[f"{_folder_name(arm)}/{_folder_name(name)}"] = _BoardRun(place, points)
    return runs


def _tagged(group: BoardGroup, curve: BoardCurve) -> dict[str, Points]:
    """Return the points of a curve by tag."""
    steps = {"epoch": [round(epoch) for epoch in curve.epochs]}
    if curve.flops is not None:
        steps["gflops"] = [gflops_step(flops) for flops in curve.flops]
    return {
        tag: list(zip(steps[axis], values, strict=True))
        for axis in steps
        for tag, values in zip(_band_tags(group.label, group.measure, axis), _band(curve), strict=True)
    }


def _band(curve: BoardCurve) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    return curve.mean, curve.low, curve.high


def _band_tags(label: str, measure: str, axis: Any) -> tuple[str, str, str]:
    """Return the tags of mean, least and greatest: the last two under a name that comes after all others."""
    tag = tag_name(measure, axis)
    return f"{label}/{tag}", f"~ band of {label}/least {tag}", f"~ band of {label}/greatest {tag}"


def _layout_summary(groups: Layout) -> Any:
    """Return what Custom scalars shows: for each group two charts, with a band for every arm."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata

    layout = layout_pb2.Layout()
    for label, seeds, measure in groups:
        category = layout.category.add(title=f"{label}, {seeds} {'seed' if seeds == 1 else 'seeds'}")
        # TensorBoard 2.21 shows two charts with bands the other way round: the one by epoch is to come first.
        for axis in ("gflops", "epoch"):
            mean, low, high = _band_tags(label, measure, axis)
            margin = layout_pb2.MarginChartContent(
                series=[layout_pb2.MarginChartContent.Series(value=mean, lower=low, upper=high)]
            )
            category.chart.add(title=mean.partition("/")[2], margin=margin)
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=create_summary_metadata(), tensor=tensor)])


def _folder_name(name: str) -> str:
    # A colon ends the name of a drive on some systems.
    return re.sub(r"[^\w.,=+@ -]+", "_", name.replace(":", "-"))[:_LONGEST_NAME].strip(". ") or "_"
