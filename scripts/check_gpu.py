"""Check a machine with a CUDA device, within nine minutes: that everything works there, and how fast it is.

    scripts/check_gpu.sh check --images cifar10-folder
    scripts/check_gpu.sh check --device cpu                  # the same way on a CPU, with small sizes

One part after the other:

machine        What the machine is.
tests          The tests that need a CUDA device.
default        The default study, timed.
deterministic  A study with deterministic=true, and again with a `kill -9` in the middle: are the weights the same?
processes      A study under torchrun with one process: NCCL, or gloo on a CPU.
vgg16          Training, images/s: alone, compiled, several at once, and the usual script; by benchmark.py.
resnet56       The same.
pruners        Seconds that pruning takes; by benchmark.py.
evaluate       Evaluation, recorded as a CUDA graph or not; by benchmark.py.
cost           What pruning saves: `export --cost` of VGG-16.
paper          experiment=l1_vgg16_cifar10 at full length on the images of --images, in the time that is left. It is
               stopped when time is up, and told how far it came and what all of it would take.

OUT gets check.json, rewritten after every part, a log of each part, and the results of studies. A part that fails, or
takes too long, is recorded with the last lines that it printed, and the next part goes on. The exit status is 1 if
there was such a part. scripts/README.md explains check.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from rethink_prune.files import write_json
from rethink_prune.store.metrics import METRICS_FILE, read_metrics, steady_pace
from rethink_prune.store.stage import Stage

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
PYTHON = sys.executable
LAST_LINES = 20
# Seconds that a process gets to end after SIGTERM, and the long study to save after SIGINT.
GRACE, SAVING = 5.0, 20.0

BRIEF = (
    *("arms=[finetune]", "dataset.train_limit=64", "dataset.test_limit=64"),
    *("recipe.epochs=1", "recipe.finetune.epochs=1"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; overrides of studies, and options of benchmark.py."""

    digits: tuple[str, ...]
    networks: dict[str, str]
    train: tuple[str, ...]
    pruners: tuple[str, ...]
    evaluate: tuple[str, ...]
    cost: tuple[str, ...]
    export_rounds: int
    paper_seconds: float
    paper_least: float


# A CPU's are so small that the numbers mean nothing: they show that every part runs.
SIZES = {
    "cuda": Sizes(
        digits=(),
        networks={"vgg16": "vgg16", "resnet56": "resnet56"},
        train=("--steps=391", "--rounds=1", "--lines=loop,evaluation,batches,compile,together"),
        pruners=("--networks=vgg16", "--pruners=l1,thinet,regression", "--rounds=1"),
        evaluate=("--networks=vgg16,resnet56", "--steps=157", "--rounds=3"),
        # VGG-16-A, hardly trained: what a pass costs depends on the architecture alone.
        cost=(*BRIEF, "model=vgg16", "pruner.ratio=null", "pruner.variant=A", "dataset.image_size=32"),
        export_rounds=5,
        paper_seconds=math.inf,
        paper_least=60.0,
    ),
    "cpu": Sizes(
        digits=(
            *("dataset.image_size=8", "dataset.train_limit=200", "dataset.test_limit=100"),
            *("recipe.epochs=2", "recipe.finetune.epochs=1"),
        ),
        networks={"vgg16": "resnet20", "resnet56": "resnet20"},
        train=("--steps=1", "--rounds=1"),
        pruners=("--networks=resnet20", "--pruners=l1", "--rounds=1"),
        evaluate=("--networks=resnet20", "--steps=1", "--rounds=1"),
        cost=(*BRIEF, "dataset.image_size=8"),
        export_rounds=1,
        paper_seconds=40.0,
        paper_least=10.0,
    ),
}
PAPER = "l1_vgg16_cifar10"

# Run with benchmark.py in reach; prints what it knows as JSON.
MACHINE = """
import json, os, subprocess, sys
import torch
from benchmark import describe_machine
from rethink_prune.training.runtime import prepare_runtime
runtime = prepare_runtime(sys.argv[1])
found = {**describe_machine(runtime.device), "precision": runtime.precision}
found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if runtime.device.type == "cuda":
    properties = torch.cuda.get_device_properties(runtime.device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    found |= {"driver": driver, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"memory_bytes": properties.total_memory, "compute_capability": f"{properties.major}.{properties.minor}"}
print(json.dumps(found))
"""


class FailedError(Exception):
    """A part did not do what it should; the message says what was found."""


class OutOfTimeError(Exception):
    """The time of a part is up."""


@dataclass
class Check:
    """What the parts share: where results go, the device, and the part under way.

    Attributes
    ----------
    out : Path
        The folder of the results.
    work : Path
        The folder of the stores, which go when the check is over.
    until : float
        When the part under way has to end, on the clock of `time.monotonic`.
    lines : deque of str
        The last lines that the part printed.
    log : Path
        All of its lines.
    """

    out: Path
    work: Path
    device: str
    images: Path | None = None
    until: float = math.inf
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    log: Path = Path(os.devnull)

    @property
    def sizes(self) -> Sizes:
        """How much is measured on this kind of device."""
        return SIZES[self.device]

    @property
    def left(self) -> float:
        """Seconds until the processes of the part have to be ended."""
        return self.until - GRACE - time.monotonic()

    def call(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> float:
        """Run a command to its end and return the seconds that it took.

        Raises
        ------
        FailedError
            If it ended with another status than 0.
        OutOfTimeError
            If it was ended because the time of the part was up.
        """
        start = time.monotonic()
        with self.started(*command, cwd=cwd, environment=environment) as process:
            status = self.wait(process)
        if status != 0:
            raise FailedError(f"status {status}: {' '.join(command)}")
        return time.monotonic() - start

    def wait(self, process: subprocess.Popen[str]) -> int:
        """Return the status with which a process ends in the time of the part."""
        try:
            return process.wait(timeout=max(0.0, self.left))
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None

    @contextmanager
    def started(
        self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a command, show what it prints, and end it and its children if it still runs at the end."""
        process = subprocess.Popen(
            command,
            cwd=cwd or self.work,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        reader = threading.Thread(target=self._follow, args=(process,), daemon=True)
        reader.start()
        try:
            yield process
        finally:
            # torchrun ends its processes at SIGTERM alone: they are in groups of their own.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
            reader.join(timeout=GRACE)

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("a") as log:
            for line in process.stdout:
                self.lines.append(line.rstrip("\n"))
                print(line, end="", flush=True)
                log.write(line)
                log.flush()

    def study(self, name: str, *overrides: str) -> list[str]:
        """Return the command of a study whose results are called `name`."""
        places = (f"store.root={self.work / name}", f"hydra.run.dir={self.out / name}")
        return [PYTHON, "-m", "rethink_prune", f"device={self.device}", *places, *overrides]

    def stages(self, name: str) -> Iterator[Stage]:
        """Yield the stages that are in the store of a study."""
        yield from (Stage(path) for path in sorted((self.work / name / "stages").glob("[!.]*")))

    def copy_metrics(self, name: str) -> None:
        """Copy the metrics of every stage to the results of a study, by its title."""
        for stage in self.stages(name):
            title = stage.config().get("title")
            if title is not None and (stage.folder / METRICS_FILE).is_file():
                target = self.out / name / "metrics" / f"{title.replace(':', '-')}.csv"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stage.folder / METRICS_FILE, target)

    def results(self, name: str) -> dict[str, dict[str, float]]:
        """Return accuracy and seconds of every training in the summary of a study."""
        summary = json.loads((self.out / name / "summary.json").read_text())
        entries = {"large": summary["large"], **summary["arms"]}
        return {
            title: {key: entry[key] for key in ("epochs", "top1", "seconds") if key in entry}
            for title, entry in entries.items()
        }

    def benchmark(self, found: dict[str, Any], part: str, *options: str, name: str) -> None:
        """Run a part of benchmark.py; the lines that it wrote are found even if it did not end."""
        file, script = self.out / f"{name}.json", str(SCRIPTS / "benchmark.py")
        try:
            self.call(PYTHON, script, part, f"--device={self.device}", f"--json={file}", *options)
        finally:
            # There is no file if it ended before its first line, and half of one if it ended while it wrote.
            with suppress(OSError, ValueError):
                keys = ("network", "what", "unit", "n", "median", "min", "max")
                lines = json.loads(file.read_text())["results"]
                found["lines"] = [{key: line[key] for key in keys} for line in lines]


@dataclass(frozen=True)
class Part:
    """One part of the check; it puts what it finds into a dict, so that what it knows survives its failure.

    Attributes
    ----------
    seconds : float
        The longest that it may take.
    least : float
        It is left out where less time is left.
    needs_images : bool
        It is left out without --images.
    """

    name: str
    seconds: float
    run: Callable[[Check, dict[str, Any]], None]
    least: float = 2 * GRACE
    needs_images: bool = False


def check_machine(check: Check, found: dict[str, Any]) -> None:
    check.call(PYTHON, "-c", MACHINE, check.device, cwd=SCRIPTS)
    found.update(json.loads(check.lines[-1]))


def check_tests(check: Check, found: dict[str, Any]) -> None:
    # Other files may need libraries that are not there.
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    try:
        check.call(PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "cuda", *files, cwd=ROOT)
    finally:
        found["summary"] = check.lines[-1].strip("= ") if check.lines else None


def check_default(check: Check, found: dict[str, Any]) -> None:
    found["command_seconds"] = check.call(*check.study("default", *check.sizes.digits))
    found["trainings"] = check.results("default")
    check.copy_metrics("default")


def check_deterministic(check: Check, found: dict[str, Any]) -> None:
    once, again = "deterministic", "deterministic_killed"
    options = (*check.sizes.digits, "deterministic=true")
    check.call(*check.study(once, *options))
    with check.started(*check.study(again, *options, "store.checkpoint_seconds=0")) as process:
        while not in_the_middle(check, again):
            if process.poll() is not None:
                raise FailedError(f"the study ended with {process.returncode} before it was killed")
            if check.left <= 0:
                raise OutOfTimeError
            time.sleep(0.01)
        process.kill()
    check.call(*check.study(again, *options))
    expected, weights = digests(check, once), digests(check, again)
    other = {name: value for name, value in weights.items() if expected.get(name) != value}
    found.update(weights_sha256=expected, other_weights_after_kill=other)
    if other or set(expected) != set(weights):
        raise FailedError(f"not the same bits after the kill: {', '.join(other) or 'other stages'}")


def in_the_middle(check: Check, name: str) -> bool:
    """Tell whether an arm of a study has ended its first epoch and saved a checkpoint, but is not done."""
    return any(
        stage.name.startswith("scratch-") and read_metrics(stage.folder) and list(stage.folder.glob("checkpoint-*.pt"))
        for stage in check.stages(name)
    )


def digests(check: Check, name: str) -> dict[str, str]:
    """Return the SHA-256 of the weights of every stage of a study."""
    files = {stage.name: stage.folder / "model.safetensors" for stage in check.stages(name)}
    return {stage: hashlib.sha256(file.read_bytes()).hexdigest() for stage, file in files.items() if file.is_file()}


def check_processes(check: Check, found: dict[str, Any]) -> None:
    _, _, *study = check.study("processes", *check.sizes.digits, "recipe.epochs=2", "recipe.finetune.epochs=1")
    launcher = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m")
    found["command_seconds"] = check.call(*launcher, *study)
    found["trainings"] = check.results("processes")
    # A study alone needs nobody to talk to.
    check.call(*launcher[:-1], str(SCRIPTS / "collective.py"), check.device, environment={"NCCL_DEBUG": "VERSION"})
    lines = check.log.read_text().splitlines()
    found["nccl"] = next((line for line in lines if "NCCL version" in line), None)
    found["sum"] = next((line for line in lines if line.startswith("sum ")), None)


def check_throughput(check: Check, found: dict[str, Any], *, network: str) -> None:
    options = (f"--networks={check.sizes.networks[network]}", *check.sizes.train)
    check.benchmark(found, "train", *options, name=network)


def check_pruners(check: Check, found: dict[str, Any]) -> None:
    check.benchmark(found, "pruners", *check.sizes.pruners, name="pruners")


def check_evaluate(check: Check, found: dict[str, Any]) -> None:
    check.benchmark(found, "evaluate", *check.sizes.evaluate, name="evaluate")


def check_cost(check: Check, found: dict[str, Any]) -> None:
    check.call(*check.study("cost", *check.sizes.cost))
    file, rounds = check.out / "cost.json", f"--rounds={check.sizes.export_rounds}"
    run = str(check.out / "cost")
    check.call(
        *(PYTHON, "-m", "rethink_prune.export", run, "--cost", f"--device={check.device}", rounds, f"--json={file}")
    )
    content = json.loads(file.read_text())
    found.update({key: content[key] for key in ("recorded", "full_batch", "speedup")})


def check_paper(check: Check, found: dict[str, Any]) -> None:
    assert check.images is not None
    images = ("dataset=folder", f"dataset.root={check.images}", "dataset.image_size=32")
    command = check.study(PAPER, f"experiment={PAPER}", *images)
    try:
        with check.started(*command) as process:
            while process.poll() is None and check.left > SAVING:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(5.0, max(0.1, check.left - SAVING)))
                check.copy_metrics(PAPER)  # so that nothing is lost if this process is killed
            found["stopped"] = process.poll() is None
            if found["stopped"]:
                process.send_signal(signal.SIGINT)
            status = check.wait(process)
    finally:
        check.copy_metrics(PAPER)
        found.update(progress_of(check, PAPER))
    if status != 0 and not (found["stopped"] and status == 128 + signal.SIGINT):
        raise FailedError(f"status {status}: {' '.join(command)}")


def progress_of(check: Check, name: str) -> dict[str, Any]:
    """Return how far the trainings of a study are, and the seconds that all of it would take.

    A training that has not been for two epochs counts at the pace of the large network, which is the largest. Of arms
    that train at once, the slowest counts.
    """
    file = check.out / name / "plan.json"
    if not file.is_file():
        return {}
    plan = json.loads(file.read_text())
    rows = {stage.config().get("title"): read_metrics(stage.folder) for stage in check.stages(name)}
    large = steady_pace(rows.get("large", []))
    at_once = any("together" in stage.config().get("computed", {}) for stage in check.stages(name))
    trainings, seconds = {}, {}
    for title, entry in {"large": plan["large"], **plan["arms"]}.items():
        done, epochs = rows.get(title, []), entry["epochs"]
        pace = steady_pace(done) or large
        # The first epoch holds the warm-up.
        spent = done[-1]["seconds"] if done else 0.0
        seconds[title] = spent + (epochs - len(done)) * (pace or math.nan)
        trainings[title] = {
            "epoch": len(done),
            "epochs": epochs,
            "seconds_per_epoch": pace if len(done) > 1 else None,
            "top1": done[-1].get("test_top1") if done else None,
        }
    arms = [seconds[title] for title in plan["arms"]]
    total = seconds["large"] + (max(arms) if at_once else sum(arms))
    return {"progress": trainings, "training_seconds_of_all": None if math.isnan(total) else total}


def parts_for(device: str) -> list[Part]:
    """Return all parts, in their order."""
    sizes = SIZES[device]
    return [
        Part("machine", 60.0, check_machine),
        Part("tests", 90.0, check_tests),
        Part("default", 60.0, check_default),
        Part("deterministic", 100.0, check_deterministic),
        Part("processes", 60.0, check_processes),
        Part("vgg16", 100.0, lambda check, found: check_throughput(check, found, network="vgg16")),
        Part("resnet56", 150.0, lambda check, found: check_throughput(check, found, network="resnet56")),
        Part("pruners", 60.0, check_pruners),
        Part("evaluate", 40.0, check_evaluate),
        Part("cost", 50.0, check_cost),
        Part("paper", sizes.paper_seconds, check_paper, least=sizes.paper_least + SAVING, needs_images=True),
    ]


def run_parts(check: Check, parts: Sequence[Part], *, seconds: float) -> bool:
    """Run the parts within so many seconds; returns whether none of them failed or took too long."""
    start, file = time.monotonic(), check.out / "check.json"
    end = start + seconds
    records: dict[str, dict[str, Any]] = {part.name: {"state": "left out"} for part in parts}
    content = {"device": check.device, "limit_seconds": seconds, "seconds": 0.0, "parts": records}

    def write() -> None:
        content["seconds"] = time.monotonic() - start
        write_json(file, content)

    for part in parts:
        left = end - time.monotonic()
        if left < part.least:
            records[part.name] = {"state": "left out", "reason": f"{left:.0f} s are left of at least {part.least:.0f}"}
            write()
            continue
        if part.needs_images and check.images is None:
            records[part.name] = {"state": "left out", "reason": "needs --images"}
            write()
            continue
        limit = min(part.seconds, left)
        print(f"\n== {part.name}: at most {limit:.0f} s, {left:.0f} s are left", flush=True)
        check.until, check.log = time.monotonic() + limit, check.out / f"{part.name}.log"
        check.lines.clear()
        records[part.name] = record = {"state": "running", "limit_seconds": limit}
        write()
        begun = time.monotonic()
        try:
            part.run(check, record)
            record["state"] = "done"
        except OutOfTimeError:
            record["state"] = "out of time"
        except KeyboardInterrupt:
            record["state"] = "stopped"
            raise
        except Exception as error:
            # Whatever goes wrong in one part, the next ones have something to say.
            record.update(state="failed", reason=f"{error or type(error).__name__}")
        finally:
            record["seconds"] = time.monotonic() - begun
            if record["state"] != "done":
                record["last_lines"] = list(check.lines)
            write()
        print(f"== {part.name}: {record['state']}, {record['seconds']:.1f} s", flush=True)
        if part.run is check_machine and record["state"] != "done":
            break  # without the device, nothing else can run
    return not any(record["state"] in ("failed", "out of time") for record in records.values())


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    parts = [part for part in parts_for(options.device) if part.name in options.parts]
    with TemporaryDirectory(prefix="check-gpu-") as work:
        check = Check(options.out.resolve(), Path(work), options.device, options.images and options.images.resolve())
        try:
            good = run_parts(check, parts, seconds=60 * options.minutes)
        except KeyboardInterrupt:
            sys.exit(130)
    print(f"\n{options.out / 'check.json'}")
    for name, record in json.loads((options.out / "check.json").read_text())["parts"].items():
        print(f"{name:14s} {record['state']:12s} {record.get('seconds', 0):6.1f} s  {record.get('reason', '')}")
    sys.exit(not good)


def interrupt(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C, with what runs."""
    raise KeyboardInterrupt


def parse_arguments() -> argparse.Namespace:
    names = [part.name for part in parts_for("cuda")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the results, without an earlier check")
    parser.add_argument("--device", choices=list(SIZES), default="cuda", help="cpu: small sizes (%(default)s)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="CIFAR-10, as cifar_to_folder.py writes it")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="for everything (%(default)s)")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=names, metavar="A,B", help="those alone (all)"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(names)):
        parser.error(f"argument --parts: {','.join(unknown)}: must be of {', '.join(names)}")
    if not options.minutes > 0:
        parser.error(f"argument --minutes: {options.minutes:g}: must be more than 0")
    for side in ("train", "test"):
        if options.images is not None and not (options.images / side).is_dir():
            parser.error(f"argument --images: {options.images}: must hold the folders train and test")
    if (options.out / "check.json").exists():
        parser.error(f"argument OUT: {options.out}: holds an earlier check.json; give another folder")
    return options


if __name__ == "__main__":
    main()
