"""Trainings in the real trackers, offline and on this machine, read back from what they keep."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness import SMALL, configure
from rethink_prune import config
from rethink_prune.errors import UserError
from rethink_prune.report.__main__ import main as report
from rethink_prune.store.metrics import read_metrics
from rethink_prune.study.run import run_study
from rethink_prune.tracking import sender, trackers
from rethink_prune.tracking.sender import Trackers
from rethink_prune.tracking.trackers import KNOWN, TrackedRun
from rethink_prune.training.interrupts import Interrupts

ALL = f"tracker=[{','.join(KNOWN)}]"
VARIABLES = ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "TRACKIO_DIR", "TRACKIO_SERVER_URL", "MLFLOW_TRACKING_URI")

Runs = dict[str, dict[str, dict[str, Any]]]  # by tracker and stage

# Of Trackio: which folder it reads is decided once in a process.
READ_TRACKIO = """
    import json, trackio
    from trackio.sqlite_storage import SQLiteStorage
    runs = list(trackio.Api().runs("rethink-prune"))
    print(json.dumps({run.name: [run.config, SQLiteStorage.get_logs("rethink-prune", run.name)] for run in runs}))
"""


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a run's file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no place for a header in this block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def read_wandb(folder: Path) -> dict[str, dict[str, Any]]:
    """Return runs by identifier, in a form that those of all trackers have."""
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = wandb_records(file)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.run_id not in found, "one folder a run"
        items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
        rows = [{(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in row} for row in items]
        exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        chosen = {item.key: json.loads(item.value_json) for item in run.config.update}
        found[run.run_id] = {
            "arm": run.job_type,
            "group": run.run_group,
            "config": {name: chosen[name] for name in ("arm", "seed", "params")},
            "rows": {row["_step"]: {name: row[name] for name in row if name[0] != "_"} for row in rows},
            "epochs": [row["_step"] for row in rows],
            "finished": exits == [0],
        }
    return found


def read_trackio(folder: Path, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READ_TRACKIO)],
        env={**environment, "TRACKIO_DIR": str(folder / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    found = {}
    for name, (chosen, logs) in json.loads(done.stdout.splitlines()[-1]).items():
        rows = [{key: row[key] for key in row if key not in ("timestamp", "step")} for row in logs]
        found[name] = {
            "arm": chosen["arm"],
            "group": chosen["_Group"],
            "config": {key: chosen[key] for key in ("arm", "seed", "params")},
            "rows": {row["step"]: values for row, values in zip(logs, rows, strict=True)},
            "epochs": [row["step"] for row in logs],
            "finished": True,  # it has no states
        }
    return found


def read_mlflow(folder: Path) -> dict[str, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rethink-prune")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        steps = [point.step for point in histories["epoch"]]
        stage, params = run.data.tags["stage"], run.data.params
        assert stage not in found
        found[stage] = {
            "arm": run.data.tags["arm"],
            "group": run.data.tags["study"],
            "config": {"arm": params["arm"], "seed": int(params["seed"]), "params": int(params["params"])},
            "rows": {
                step: {name: at.value for name, ats in histories.items() for at in ats if at.step == step}
                for step in steps
            },
            "epochs": steps,
            "finished": run.info.status == "FINISHED",
        }
    return found


class Home:
    """A store, the runs that use it, and what its trackers have."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.trackers = folder / "store/trackers"
        self.stopped: Runs = {}
        self._environment = environment

    def study(self, name: str, *overrides: str) -> dict[str, Any]:
        words = (*SMALL, f"store.root={self.folder / 'store'}", *overrides)
        with Interrupts() as interrupts:
            return run_study(configure(*words), self.folder / name, interrupts)

    def stages(self) -> dict[str, Path]:
        """Return the folders of the trainings by the names of their stages."""
        return {file.parent.name: file.parent for file in (self.folder / "store/stages").glob("*/metrics.csv")}

    def tracked(self, *names: str) -> Runs:
        """Return what some trackers have, or all."""
        read = {
            "wandb": lambda: read_wandb(self.trackers),
            "trackio": lambda: read_trackio(self.trackers, self._environment),
            "mlflow": lambda: read_mlflow(self.trackers),
        }
        return {name: read[name]() for name in names or read}

    def check_rows(self, *names: str) -> Runs:
        """See that they have every epoch of every training once; return what they have."""
        found = self.tracked(*names)
        for name, runs in found.items():
            assert runs.keys() == self.stages().keys(), name
            for stage, run in runs.items():
                rows = read_metrics(self.stages()[stage])
                assert run["epochs"] == [row["epoch"] for row in rows], (name, stage)
                assert run["finished"], (name, stage)
                for row in rows:
                    values = dict(run["rows"][row["epoch"]])
                    assert values.pop("train_gflops") > 0
                    assert values == {plain(column): pytest.approx(value) for column, value in row.items()}, name
        return found


def plain(column: str) -> str:
    part, _, measure = column.partition("_")
    return f"{part}/{measure}" if part in ("train", "test") else column


@pytest.fixture(scope="module")
def environment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        # However busy the machine is.
        patch.setattr(sender, "PATIENCE_SECONDS", 300.0)
        # Nobody is logged in here, whoever runs the tests.
        patch.setenv("NETRC", "/nonexistent")
        yield dict(os.environ)


# Kills a study in the second epoch of its arm, when the first has reached all trackers; an epoch has four steps.
KILLED = """
    import os, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from rethink_prune.__main__ import main
    from rethink_prune.tracking.sender import Sender
    from rethink_prune.training.step import PlainStep

    ask, step = Sender._ask, PlainStep.__call__
    taken, steps = set(), 0

    def note_what_is_taken(self, message):
        answer = ask(self, message)
        if message["run"]["title"] == "scratch_e":
            taken.add(self.name)
        return answer

    def count(*arguments):
        global steps
        steps += 1
        while steps == 8 + 6 and len(taken) < 3:
            time.sleep(0.1)
        if steps == 8 + 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    Sender._ask, PlainStep.__call__ = note_what_is_taken, count
    sys.argv[0] = "rethink_prune"
    main()
"""
STUDY = (ALL, "arms=[scratch_e]", "large.baseline=true", "store.checkpoint_seconds=0")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Home:
    """Return where a study was killed, when the processes of its trackers have ended."""
    home = Home(tmp_path_factory.mktemp("tracked"), environment)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *SMALL, *STUDY, "hydra.run.dir=killed"],
        cwd=home.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    locks = list(home.trackers.glob("complete/*/scratch-*.lock"))
    assert len(locks) == 3
    for lock in locks:
        FileLock(lock).acquire(timeout=60).lock.release()
    home.stopped = home.tracked()
    return home


@pytest.fixture(scope="module")
def home(killed: Home) -> Home:
    """Return the same after that study went on to its end, and after one that shares its trainings."""
    killed.study("first", *STUDY)
    killed.study("second", ALL, "arms=[finetune,scratch_e]")
    return killed


@pytest.fixture(scope="module")
def tracked(home: Home) -> Runs:
    return home.check_rows()


@pytest.mark.slow
def test_a_killed_study_leaves_its_runs_open(killed: Home) -> None:
    for name, runs in killed.stopped.items():
        states = {run["arm"]: (run["epochs"], run["finished"]) for run in runs.values()}
        assert states == {"large": ([1, 2], True), "scratch_e": ([1], name == "trackio")}


@pytest.mark.slow
def test_each_training_is_a_run_and_a_reused_one_is_not_written_again(home: Home, tracked: Runs) -> None:
    summary = json.loads((home.folder / "second/summary.json").read_text())
    entries = {"large": summary["large"], **summary["arms"]}
    for runs in tracked.values():
        assert len(runs) == 3
        assert len({run["group"] for run in runs.values()}) == 1, "the studies differ in their arms alone"
        for title, entry in entries.items():
            run = runs[Path(entry["stage"]).name]
            assert run["arm"] == title
            assert run["config"] == {"arm": title, "seed": 0, "params": entry["params"]}
            # With those of its ancestors, as TensorBoard shows it.
            last = run["rows"][entry["epochs"]]["train_gflops"]
            assert last == pytest.approx(entry["train_flops_total"] / 1e9)


@pytest.mark.slow
def test_they_keep_their_files_beside_the_store_alone(home: Home, tracked: object) -> None:
    assert {path.name for path in home.folder.iterdir()} == {"store", "killed", "first", "second"}
    assert {path.name for path in (home.folder / "store").iterdir()} == {
        *("cache", "format.json", "runs", "stages", "trackers")
    }


@pytest.mark.slow
def test_runs_that_are_pushed_later_are_the_same(home: Home, tracked: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--push", "--tracker", "wandb", "--tracker", "trackio", str(home.folder / "store")]
    home.trackers.rename(home.folder / "before")
    assert report([*command, str(home.folder / "first")]) == 0
    said = [line.split(", from")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["wandb: 3 of 3 trainings were new", "trackio: 3 of 3 trainings were new"]
    assert home.check_rows("wandb", "trackio") == {name: tracked[name] for name in ("wandb", "trackio")}
    assert report(command) == 0
    assert "wandb: 0 of 3 trainings were new" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, environment: Mapping[str, str]) -> None:
    home = Home(tmp_path, environment)
    home.trackers.mkdir(parents=True)
    (home.trackers / "mlflow.db.new").write_text("what a kill leaves while MLflow makes its database")
    for epochs, state in ((2, "running"), (3, "finished")):
        with Trackers(tuple(KNOWN), home.trackers) as each:
            each.send(run_named("finetune-1"), rows(epochs), state)
        assert [sender.problem for sender in each.senders.values()] == [None] * 3
        for name, runs in home.tracked().items():
            assert runs["finetune-1"]["epochs"] == list(range(1, epochs + 1)), name
            assert runs["finetune-1"]["rows"][epochs]["test/top1"] == 50 + epochs
            assert runs["finetune-1"]["finished"] == (state == "finished" or name == "trackio")


BAD_TRACKERS = """
import os, time
from pathlib import Path

class Base:
    destination = "nowhere"
    epochs = 0
    def __init__(self, folder):
        self.folder = folder
    def open(self, run):
        return self
    def log(self, metrics, epoch):
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"{epoch} {metrics['test/top1']}\\n")
    def close(self, state):
        pass

class Raising(Base):
    def log(self, metrics, epoch):
        raise ConnectionError("no route to the server\\nand a long explanation")

class Hanging(Base):
    def log(self, metrics, epoch):
        time.sleep(600)

class Dying(Base):
    def log(self, metrics, epoch):
        os._exit(3)

class Slow(Base):
    def open(self, run):
        time.sleep(2)
        return self
"""


def rows(epochs: int) -> list[dict[str, float]]:
    return [{"epoch": float(epoch), "images": 10.0, "test_top1": 50.0 + epoch} for epoch in range(1, epochs + 1)]


def run_named(stage: str) -> TrackedRun:
    return TrackedRun(stage, "finetune", "group", {"arm": "finetune", "seed": 0, "params": 10})


@pytest.fixture
def bad_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad_trackers.py").write_text(BAD_TRACKERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Raising", "ConnectionError: no route to the server"),
        ("Dying", "its process ended"),
        ("Missing", "UserError: tracker=bad_trackers:Missing: bad_trackers has no Missing; did you mean Raising?"),
        ("Hanging", "did not take everything in time"),
    ],
)
def test_a_tracker_that_fails_is_said_once_and_fails_nothing(
    name: str, reason: str, bad_trackers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "PATIENCE_SECONDS", 1.0 if name == "Hanging" else 120.0)
    start = time.monotonic()
    with Trackers([f"bad_trackers:{name}"], bad_trackers / "trackers") as both:
        for epoch in range(1, 200):
            both.send(run_named("finetune-1"), rows(epoch))
            both.send(run_named("scratch-1"), rows(epoch))
        assert time.monotonic() - start < 60, "whoever sends does not wait"
    assert name != "Hanging" or time.monotonic() - start < 60, "it sleeps for ten minutes"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(f"tracker=bad_trackers:{name}: {reason} (see ")
    assert f"--push --tracker bad_trackers:{name}" in said


def test_nothing_piles_up_behind_a_slow_tracker(bad_trackers: Path) -> None:
    with Trackers(["bad_trackers:Slow"], bad_trackers / "trackers") as slow:
        for epoch in range(1, 1001):
            slow.send(run_named("finetune-1"), rows(epoch))
            (only,) = slow.senders.values()
            assert len(only._updates) <= 1
    lines = (bad_trackers / "trackers/log.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, 1001)), "and nothing is lost"


def test_a_study_has_the_same_summary_whatever_its_trackers_do(
    bad_trackers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "PATIENCE_SECONDS", 1.0)
    words = (*SMALL, "arms=[scratch_e]", "recipe.epochs=1")
    summaries = []
    for name, chosen in (("with", "bad_trackers:Raising,bad_trackers:Hanging"), ("without", "")):
        with Interrupts() as interrupts:
            configured = configure(*words, f"store.root={bad_trackers / name}", f"tracker=[{chosen}]")
            summaries.append(run_study(configured, bad_trackers / f"run-{name}", interrupts))
    assert len([record for record in caplog.records if record.getMessage().startswith("tracker=")]) == 2
    ours, theirs = ({**summary["arms"]["scratch_e"]} for summary in summaries)
    assert Path(ours["stage"]).name == Path(theirs["stage"]).name, "trackers are in no key"
    assert ours["top1"] == theirs["top1"]
    assert summaries[0]["study"].pop("tracker") == ["bad_trackers:Raising", "bad_trackers:Hanging"]
    assert summaries[0]["study"] == summaries[1]["study"]


def test_one_process_at_a_time_sends_a_run(bad_trackers: Path) -> None:
    """As studies of a sweep do that wait for one training: the others find it complete."""
    folder = bad_trackers / "trackers"
    with Trackers(["bad_trackers:Slow"], folder) as first, Trackers(["bad_trackers:Slow"], folder) as second:
        for each in (first, second):
            each.send(run_named("large-1"), rows(3), "finished")
    sent = sorted(each.senders["bad_trackers:Slow"].sent["large-1"] for each in (first, second))
    assert sent == [0, 3]
    assert len((folder / "log.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
        ("trackio", {"TRACKIO_SERVER_URL": "http://127.0.0.1:9", "TRACKIO_WRITE_TOKEN": "x"}),
        pytest.param(
            "wandb", {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_server_that_cannot_be_reached_is_said_once(
    name: str,
    variables: Mapping[str, str],
    environment: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with Trackers([name], tmp_path) as unreachable:
        unreachable.send(run_named("large-1"), rows(1))
        unreachable.send(run_named("large-2"), rows(2), "finished")
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "127.0.0.1" in said
    assert not list(tmp_path.rglob("large-*.json")), "it can be sent later"


def test_a_package_that_is_missing_is_said_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The package index has none of this name, and so has this environment.
    monkeypatch.setitem(trackers.KNOWN, "tracker-not-there", trackers.WandbTracker)  # type: ignore[arg-type]
    with Trackers(["tracker-not-there"], tmp_path / "trackers") as none:
        none.send(run_named("large-1"), rows(1))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "tracker=tracker-not-there: is not installed, nothing is sent to it; "
        'pip install "rethink-prune[tracker-not-there]"'
    )
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("[wandbb]", "tracker=[wandbb]: wandbb: no such tracker (your own: path.to.module:Class); did you mean wandb?"),
        ("[wandb,wandb]", "tracker=[wandb, wandb]: a tracker is named twice"),
        ("wandb", "tracker=wandb: must be a list"),
    ],
)
def test_what_makes_no_sense_is_refused(chosen: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(f"tracker={chosen}")
    assert str(error.value).startswith(message)


def test_the_configuration_knows_the_trackers_there_are() -> None:
    assert tuple(KNOWN) == config.TRACKERS
