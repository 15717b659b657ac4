"""The notebook that walks through a study in Python runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "experiments/walkthrough/walkthrough.ipynb"


def test_it_is_saved_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 6
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_it_runs_and_shows_tables_verdicts_and_curves(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # A cell that raises ends this with its error.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "| scratch_b | " in text
    assert "Scratch-B and fine-tuning" in text
    assert "Warning" not in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*/summary.json"))]
    assert [run["study"]["seed"] for run in runs] == [0, 1, 2]
    assert {entry["status"] for run in runs for entry in run["arms"].values()} == {"done"}
