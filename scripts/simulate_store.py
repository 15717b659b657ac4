"""Measure a store of many people: 10,000 runs with 100,000 stages, and 64 processes that ask for stages at once.

    python scripts/simulate_store.py                                # all of it; let nothing else run meanwhile
    python scripts/simulate_store.py --runs 1000                    # a tenth
    python scripts/simulate_store.py --folder big --keep            # the store stays there, to try commands on

One small study is really run. Its stages and its summary are written again and again, under other names, with other
accuracies and ten times as many epochs: the same files with the same content, but for weights, which are empty files of
the right size. So no study can use a simulated stage; those of the real study lie among them, and can be used. 500 runs
share a network and a data set: 5 pruners x 10 ratios x 10 seeds. A run has a prune stage and nine arms of its own, and
shares the large network of its seed. Of every 500 runs, one left a stage that was stopped, and one that failed.

What is measured:

status   ``python -m rethink_prune.status STORE``: seconds of the whole command, and its peak resident memory.
start    A study whose stages are all found, in this store and in one that holds nothing else. Both take turns in one
         process, from the configuration to the summary; the time of importing the libraries would hide a difference.
at once  Processes that ask for stages of overlapping lists, each in an order of its own, as a study does. A file for
         each stage, which is only appended to, says how often its work was done.
report   ``python -m rethink_prune.report STORE``, as for status.

All files have just been written, so the operating system has them in memory: a disk that has to be read adds its own
time. Values are medians [least, greatest]. The exit status is 1 if any work was done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethink_prune.store.store import Store
from rethink_prune.text import markdown

ARMS = (
    "finetune",
    "scratch_e",
    "scratch_b",
    "lottery",
    "reshuffle",
    "retrain@2",
    "retrain@3",
    "scratch@2",
    "scratch@3",
)
# A study of a few seconds.
STUDY = (
    *("dataset.image_size=8", "dataset.train_limit=200", "dataset.test_limit=100", "precision=fp32", "device=cpu"),
    *("recipe.epochs=4", "recipe.finetune.epochs=1", f"arms=[{','.join(ARMS)}]"),
)
PRUNERS = ("l1", "fpgm", "random", "uniform", "taylor")
RATIOS = tuple(number / 20 for number in range(1, 20, 2))
SEEDS = range(10)
DATASETS = 4
EPOCHS_FACTOR = 10
# Written as files of the right size without content.
WEIGHTS = ("model.safetensors", "sample.safetensors", "architecture.safetensors")
# What one process asks for of all that are asked for at once.
ASKED, STAGES_ASKED = 25, 100


@dataclass(frozen=True)
class Template:
    """The real study: the record that its store keeps, and by title each stage's files and sizes of weights."""

    record: dict[str, Any]
    files: dict[str, dict[str, bytes]]
    weights: dict[str, dict[str, int]]


@dataclass(frozen=True)
class SimulatedRun:
    """What tells one run from the others."""

    network: int
    pruner: str
    ratio: float
    seed: int

    def stage(self, title: str, real_name: str) -> str:
        """Return the name that a stage of the real study has in this run."""
        what = (self.network, self.seed) if title == "large" else self
        key = hashlib.sha256(f"{title} {what}".encode()).hexdigest()[:16]
        return f"{real_name.rpartition('-')[0]}-{key}"


@dataclass(frozen=True)
class Took:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_real_study(store: Path, run_dir: Path) -> None:
    """Run the study, or find all of it in the store."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from rethink_prune.files import conf_dir
    from rethink_prune.study.prepare import check_config
    from rethink_prune.study.run import run_study
    from rethink_prune.training.interrupts import Interrupts

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        tree = compose("config", overrides=[*STUDY, f"store.root={store}"])
    plain: Any = OmegaConf.to_container(tree, resolve=True)
    with Interrupts() as interrupts, contextlib.redirect_stdout(io.StringIO()):
        run_study(check_config(plain), run_dir, interrupts)


def read_template(store: Path) -> Template:
    record = json.loads(next((store / "runs").glob("*.json")).read_text())
    files, weights = {}, {}
    for title, name in record["stages"].items():
        found = [*(store / "stages" / name).iterdir()]
        files[title] = longer({path.name: path.read_bytes() for path in found if path.name not in WEIGHTS})
        weights[title] = {path.name: path.stat().st_size for path in found if path.name in WEIGHTS}
    return Template(record, files, weights)


def longer(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a stage as if it had been trained for more epochs."""
    if "metrics.csv" not in files:
        return files
    head, *lines = files["metrics.csv"].decode().splitlines()
    rows = [line.partition(",")[2] for line in lines for _ in range(EPOCHS_FACTOR)]
    lines = [head, *(f"{epoch},{row}" for epoch, row in enumerate(rows, 1)), ""]

    def multiplied(found: re.Match[bytes]) -> bytes:
        return found[1] + b"%d" % (EPOCHS_FACTOR * int(found[2]))

    texts = {name: re.sub(rb'(epochs"?: )(\d+)', multiplied, files[name]) for name in ("status.json", "config.yaml")}
    return {**files, **texts, "metrics.csv": "\n".join(lines).encode()}


def simulated_runs() -> Iterator[SimulatedRun]:
    for network in itertools.count():
        for pruner, ratio, seed in itertools.product(PRUNERS, RATIOS, SEEDS):
            yield SimulatedRun(network, pruner, ratio, seed)


def write_stage(folder: Path, template: Template, title: str, **changed: bytes) -> None:
    """Write a stage, unless it is there: another run, or another process, may have it as well."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    for name, content in (template.files[title] | changed).items():
        (folder / name).write_bytes(content)
    for name, count in template.weights[title].items():
        with (folder / name).open("wb") as file:
            file.truncate(count)


def write_run(root: Path, template: Template, run: SimulatedRun) -> None:
    summary, stages = json.loads(json.dumps(template.record["summary"])), {}
    for title, real_name in template.record["stages"].items():
        stages[title] = run.stage(title, real_name)
        folder = root / "store/stages" / stages[title]
        write_stage(folder, template, title)
        entry = summary["pruned"] if title == "prune" else summary.get(title) or summary["arms"][title]
        # The same for all runs that share a stage, as whole images of 10,000.
        drawn = random.Random(stages[title])
        entry |= {"stage": str(folder), "top1": round(drawn.gauss(90 + len(title) / 10, 0.3), 2)}
        if "epochs" in entry:
            entry |= {"epochs": EPOCHS_FACTOR * entry["epochs"], "top1_best": round(entry["top1"] + 0.1, 2)}
    study = summary["study"]
    study |= {"dataset": f"digits{run.network % DATASETS}", "model": f"resnet20_{run.network}", "pruner": run.pruner}
    study |= {"target": {"ratio": run.ratio}, "seed": run.seed, "test_images": 10_000}
    study["settings"]["pruner"] |= {"name": run.pruner, "ratio": run.ratio}
    folder = root / "runs" / f"network{run.network}" / f"{run.pruner}-{run.ratio}-{run.seed}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    record = {"run_dir": str(folder), "stages": stages, "summary": summary}
    (root / "store/runs" / f"{run.stage('run', 'run-')}.json").write_text(json.dumps(record))


def write_part(root: Path, template: Template, runs: Sequence[SimulatedRun]) -> None:
    for run in runs:
        write_run(root, template, run)
        if run == SimulatedRun(run.network, PRUNERS[0], RATIOS[0], SEEDS[0]):
            status = json.loads(template.files["scratch_e"]["status.json"])
            for state in ("stopped", "failed"):
                folder = root / "store/stages" / run.stage(state, "scratch-")
                changed = json.dumps({**status, "state": state, "reason": "the training loss became nan"}).encode()
                write_stage(folder, template, "scratch_e", **{"status.json": changed})


def make_store(root: Path, runs: int) -> None:
    template, chosen = read_template(root / "alone"), [*itertools.islice(simulated_runs(), runs)]
    parts = os.cpu_count() or 1
    at_once([(write_part, (root, template, chosen[part::parts])) for part in range(parts)])


def at_once(works: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """Call functions in a process each, and wait for all."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=arguments) for work, arguments in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def in_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own: this one stays small, since commands begin as copies of it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def time_command(*words: str, output: Path) -> Took:
    start = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=file)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{words}: exit status {process.returncode}"
    return Took(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def time_starts(root: Path, pairs: int) -> list[tuple[float, float]]:
    """Return seconds of a study that finds all its stages: in the large store, and in the one that has no others."""
    for store in ("store", "alone"):
        run_real_study(root / store, root / "warm-up")
    found = []
    for pair in range(pairs):
        seconds = {}
        # Each is first in turn.
        for store in ("store", "alone") if pair % 2 else ("alone", "store"):
            start = time.perf_counter()
            run_real_study(root / store, root / "found")
            seconds[store] = time.perf_counter() - start
        found.append((seconds["store"], seconds["alone"]))
    return found


def ask(root: Path, number: int) -> None:
    """Ask for stages as a study does: what is not done, and not done by another process meanwhile, is done here."""
    store, choose = Store(root / "store"), random.Random(number)
    for asked in choose.sample(range(STAGES_ASKED), ASKED):
        stage = store.stage(f"asked-{asked}")
        if stage.result() is None:
            with stage.hold():
                if stage.result() is None:
                    with (root / "journals" / f"{asked}").open("a") as journal:
                        journal.write(f"{os.getpid()}\n")
                    stage.begin({"network": {}, "key": {"asked": asked}}, None)
                    stage.model_file.write_bytes(bytes(500_000))
                    stage.finish({"top1": asked})
        assert stage.result() == {"top1": asked}


def times_done(root: Path) -> list[int]:
    """Return how often the work of each stage was done that was asked for."""
    return [len(journal.read_text().splitlines()) for journal in (root / "journals").iterdir()]


def of_values(values: Sequence[float], digits: str = ".3g") -> str:
    low, middle, high = (format(of(values), digits) for of in (min, statistics.median, max))
    return f"{middle} [{low}, {high}]"


def measure(root: Path, options: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """Make the store and measure; returns the rows of the table, and whether any work was done twice."""
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  {what}", flush=True)

    say("runs the real study")
    in_process(run_real_study, root / "store", root / "first")
    shutil.copytree(root / "store", root / "alone")
    say(f"writes {options.runs:,} runs")
    make_store(root, options.runs)
    stages = sum(1 for _ in os.scandir(root / "store/stages"))
    rows = [["the store", f"{stages:,} stages, {options.runs + 1:,} runs", "", "1"]]
    status, report = "rethink_prune.status", "rethink_prune.report"
    store, page = str(root / "store"), str(root / "report")
    taken: dict[str, list[Took]] = {"status": [], "report": []}
    for number in range(options.rounds):
        say(f"status, {number + 1} of {options.rounds}")
        taken["status"].append(time_command(status, store, output=root / "status.txt"))
    say(f"start of a study, {options.pairs} pairs")
    starts = in_process(time_starts, root, options.pairs)
    say(f"{options.processes} processes ask for {ASKED} of {STAGES_ASKED} stages each")
    (root / "journals").mkdir()
    asking = time.perf_counter()
    at_once([(ask, (root, number)) for number in range(options.processes)])
    asked, done = time.perf_counter() - asking, times_done(root)
    for number in range(options.reports):
        say(f"report, {number + 1} of {options.reports}")
        taken["report"].append(time_command(report, store, "--out", page, output=root / "report.txt"))
    say("done")
    goals = {"status": ("15 s", ""), "report": ("60 s", "4 GB")}
    for name, its in taken.items():
        n = str(len(its))
        if not its:
            continue
        rows.append([f"{name}: seconds", of_values([took.seconds for took in its]), goals[name][0], n])
        rows.append([f"{name}: CPU seconds", of_values([took.cpu_seconds for took in its]), "", n])
        rows.append([f"{name}: peak GB", of_values([took.peak_bytes / 1e9 for took in its]), goals[name][1], n])
    n = str(len(starts))
    rows.append(["start of a study, in this store: seconds", of_values([large for large, _ in starts]), "", n])
    rows.append(["start of a study, in a store of its own", of_values([alone for _, alone in starts]), "", n])
    rows.append(["start of a study, ratio of a pair", of_values([a / b for a, b in starts]), "1.1", n])
    rows.append([f"at once: seconds of {options.processes} processes", f"{asked:.3g}", "", "1"])
    rows.append(["at once: stages done; most times one was done", f"{len(done)}; {max(done)}", "once", "1"])
    return rows, max(done) > 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a store that many people share.")
    parser.add_argument("--runs", type=int, default=10_000, help="with ten stages each (%(default)s)")
    parser.add_argument("--processes", type=int, default=64, help="that ask for stages at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of status (%(default)s)")
    parser.add_argument("--reports", type=int, default=2, help="how many are made (%(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="of studies that start (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the store is made; has to be new (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    if options.folder is not None:
        options.folder.mkdir(parents=True)
    root = (options.folder or Path(tempfile.mkdtemp(prefix="simulate-store-"))).absolute()
    try:
        rows, twice = measure(root, options)
    finally:
        if not options.keep:
            shutil.rmtree(root)
    print(markdown(["what", "measured", "goal: at most", "n"], rows))
    return int(twice)


if __name__ == "__main__":
    sys.exit(main())
