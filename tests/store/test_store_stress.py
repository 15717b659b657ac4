"""Many processes, one store: kills at random lose nothing, and nothing that is done is done again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from rethink_prune.files import file_digest
from rethink_prune.store.store import Store

PROCESSES, STAGES, KILLS = 8, 50, 24

# Does every stage as a study does, in an order of its own, and notes in a journal when its work begins and is done.
WORKER = """
    import os, random, sys, time
    from pathlib import Path
    from rethink_prune.store import ownership, store
    from rethink_prune.files import write_atomically

    root, seed, stages = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ownership.POLL_SECONDS, ownership.HEARTBEAT_SECONDS = 0.02, 0.05
    journal = os.open(root / "journal", os.O_WRONLY | os.O_APPEND)

    def note(event, number):
        os.write(journal, f"{event} {number} {os.getpid()}\\n".encode())

    made = store.Store(root / "store")
    made.prepare()
    note("starts", seed)
    for number in random.Random(seed).sample(range(stages), stages):
        stage = made.stage(f"scratch-{number}")
        if stage.result() is None:
            with stage.hold():
                if stage.result() is None:
                    assert stage.status().get("state") != "done"
                    note("begins", number)
                    stage.begin({"network": {}, "key": {"n": number}}, None)
                    for step in range(5):
                        time.sleep(0.05)
                        stage.check_owner()
                        write_atomically(stage.folder / "work", f"{number}: {step}".encode() * 1000)
                    stage.finish({"top1": number}, files=("work",))
                    note("done", number)
        assert stage.result() == {"top1": number}
"""


def start(root: Path, seed: int) -> subprocess.Popen[str]:
    arguments = [str(root), str(seed), str(STAGES)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), *arguments], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_kills_at_random_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    chance = random.Random(0)
    workers = [start(tmp_path, seed) for seed in range(PROCESSES)]
    ended: list[subprocess.Popen[str]] = []

    def started() -> set[int]:
        return {int(line.split()[2]) for line in journal.read_text().splitlines() if line.startswith("starts")}

    while len(started()) < PROCESSES:
        time.sleep(0.05)
    for kill in range(KILLS):
        time.sleep(chance.uniform(0.02, 0.25))
        # Those that are past their imports, where a kill cannot do harm.
        past = started()
        alive = [n for n, worker in enumerate(workers) if worker.pid in past and worker.poll() is None]
        if alive:
            n = chance.choice(alive)
            with journal.open("a") as file:
                file.write(f"kill - {workers[n].pid}\n")
            workers[n].send_signal(signal.SIGKILL)
            ended.append(workers[n])
            workers[n] = start(tmp_path, 100 + kill)
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, errors
    for worker in ended:
        worker.communicate()

    store = Store(tmp_path / "store")
    for number in range(STAGES):
        stage = store.stage(f"scratch-{number}")
        assert stage.result() == {"top1": number}
        assert (stage.folder / "work").read_bytes() == f"{number}: 4".encode() * 1000
        assert stage.status()["digests"] == {"work": file_digest(stage.folder / "work")}
        assert stage.status()["state"] == "done"
    assert len(list((tmp_path / "store/stages").iterdir())) == STAGES

    working: dict[str, str] = {}
    done: set[str] = set()
    killed: set[str] = set()
    begun: Counter[str] = Counter()
    for line in journal.read_text().splitlines():
        event, number, pid = line.split()
        if event == "begins":
            assert number not in done, f"stage {number} was begun again after it was done"
            assert working.get(number) in {None, *killed}, f"two processes worked on stage {number} at once"
            working[number] = pid
            begun[number] += 1
        elif event == "done":
            done.add(number)
        elif event == "kill":
            killed.add(pid)
    assert len(begun) == STAGES
    assert sum(begun.values()) > STAGES, "no kill hit a stage at work: the test has shown nothing"
