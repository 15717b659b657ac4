"""How long a study will take is told from the pace of epochs without warm-up, as in the table of stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import SMALL, configure
from rethink_prune.store.listing import list_stages
from rethink_prune.store.metrics import steady_pace, write_metrics
from rethink_prune.study.prepare import prepare_study
from rethink_prune.study.stages import Runner
from rethink_prune.text import duration
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Row

# Seconds of the epochs of VGG-16 on CIFAR-10, as one GPU showed them: the first has the warm-up.
FIRST, OTHERS = 8.2, 1.4


def rows(count: int, *, slow: tuple[int, ...] = (1,)) -> list[Row]:
    """Return the rows of so many epochs, of which some had a warm-up."""
    seconds, made = 0.0, []
    for epoch in range(1, count + 1):
        seconds += FIRST if epoch in slow else OTHERS
        made.append({"epoch": epoch, "images": 200, "seconds": seconds})
    return made


def test_warm_up_is_no_pace() -> None:
    assert steady_pace([]) is None
    assert steady_pace(rows(1)) is None
    assert steady_pace(rows(2)) == pytest.approx(OTHERS)
    assert steady_pace(rows(3, slow=(1, 3))) == pytest.approx(OTHERS), "a stop after two epochs"
    assert steady_pace(rows(6, slow=(1, 2, 5))) == pytest.approx(OTHERS), "two stops"


def test_the_log_and_the_table_of_stages_tell_the_time_that_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = prepare_study(configure(*SMALL, "recipe.epochs=20", "arms=[finetune]", f"store.root={tmp_path}"))
    stages = {spec.title: spec for spec in study.plan()}
    large, finetune = stages["large"], stages["finetune"]
    with Interrupts() as interrupts, caplog.at_level("INFO"):
        runner = Runner(study, tmp_path, interrupts, list(stages.values()))
        for count in (1, 2, 3):
            runner._log_time_left(large, rows(count))
    assert large.train_flops is not None
    assert finetune.train_flops is not None
    left = 18 * OTHERS + 20 * OTHERS * finetune.train_flops / large.train_flops
    assert [record.getMessage() for record in caplog.records] == [
        f"large: an epoch takes {OTHERS} s; the study will take about {duration(left)} more"
    ]

    stage = study.store.stage("large-0123")
    stage.folder.mkdir(parents=True)
    stage.begin({"network": {"name": "resnet20"}, "key": {"training": {"epochs": 20}}, "title": "large"}, None)
    remaining = []
    for count in (1, 2):
        write_metrics(stage.folder, rows(count))
        (found,) = list_stages(study.store.root)
        remaining.append(found.progress.remaining)
    assert remaining == [None, pytest.approx(18 * OTHERS)]
