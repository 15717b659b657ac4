"""The script that simulates a store of many people: what it makes is a store, and what it says of it is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rethink_prune.store.listing import list_stages

SCRIPT = Path(__file__).parents[1] / "scripts/simulate_store.py"


@pytest.mark.slow
def test_a_small_store_is_made_and_measured(tmp_path: Path) -> None:
    sizes = ["--runs", "12", "--processes", "8", "--rounds", "1", "--reports", "1", "--pairs", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--folder", str(tmp_path / "many"), "--keep"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:2] == "| "]
    found = {name: measured for name, measured, *_ in cells}
    # Ten stages a run; the large networks of ten seeds; one stopped and one failed; and the real study's eleven.
    assert found["the store"] == f"{12 * 10 + 10 + 2 + 11} stages, 13 runs"
    journals = [path.read_text().splitlines() for path in (tmp_path / "many/journals").iterdir()]
    assert found["at once: stages done; most times one was done"] == f"{len(journals)}; 1"
    assert {len(journal) for journal in journals} == {1}
    assert len({journal[0] for journal in journals}) > 1, "one process did all the work"
    states = [stage.state for stage in list_stages(tmp_path / "many/store")]
    assert {state: states.count(state) for state in set(states)} == {
        "done": 12 * 10 + 10 + 11 + len(journals),
        "stopped": 1,
        "failed": 1,
    }
    # The real study again and again is one run; ratio 0.15 has two seeds.
    rows = json.loads((tmp_path / "many/report/results.json").read_text())["tables"]
    assert sorted(len(row["seeds"]) for table in rows for row in table["rows"]) == [1, 2, 10]
