"""The doctor, where the default study cannot run; `tests/test_packaging.py` runs it where it can."""

from __future__ import annotations

from pathlib import Path

import pytest

from rethink_prune.doctor import main


@pytest.mark.parametrize(
    ("store", "content", "reason"),
    [
        ("a_file", "precious", "cannot be written (it is a file)"),
        ("damaged/format.json", "{}", "format.json: is damaged"),
        # Where nobody can write, root included.
        ("/proc/store", None, "store.root=/proc/store: cannot be written"),
    ],
)
def test_it_says_why_the_default_study_cannot_run_and_leaves_no_trace(
    store: str,
    content: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(store).parent.mkdir(exist_ok=True)
        Path(store).write_text(content)
    monkeypatch.setenv("RETHINK_PRUNE_STORE", store.removesuffix("/format.json"))
    before = sorted(tmp_path.rglob("*"))
    assert main([]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("The default study cannot run here: ")
    assert reason in said.err
    assert "The default study can run" not in said.out
    assert sorted(tmp_path.rglob("*")) == before
