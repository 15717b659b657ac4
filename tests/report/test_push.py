"""Which trackers a push takes; that it sends what a study would have sent is in tests/tracking/test_trackers.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rethink_prune.report.__main__ import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--push: these runs name no tracker; name one of wandb, trackio, mlflow: --tracker wandb"),
        (("--tracker", "wandbb"), "--tracker wandbb: no such tracker; did you mean wandb?"),
    ],
)
def test_it_has_to_be_clear_where_to(
    words: tuple[str, ...], message: str, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--push", *words, str(write_run(0, {"finetune": 90.0}))]) == 1
    assert capsys.readouterr().err == f"{message}\n"


def test_stages_that_are_not_finished_are_not_sent(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # Its stages have curves, but no status. What the run names is taken, but never imported.
    run = write_run(0, {"finetune": 90.0}, tracker=["wandb", "not_there:Tracker"])
    assert main(["--push", str(run)]) == 0
    assert capsys.readouterr().out == "nothing to send: no finished training of these runs is there\n"


def test_a_tracker_goes_with_a_push(write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tracker", "wandb", str(write_run(0, {"finetune": 90.0}))])
    assert "--tracker: goes with --push" in capsys.readouterr().err
