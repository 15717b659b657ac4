"""A study in Python: composed from a dict of overrides, planned, run, stopped and gone on with."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from harness import SMALL, configure
from rethink_prune import Study, run_study
from rethink_prune.errors import UserError
from rethink_prune.training.step import PlainStep

TINY = {
    "dataset": {"image_size": 8, "train_limit": 200, "test_limit": 100},
    "recipe.epochs": 2,
    "recipe.finetune.epochs": 1,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (None, []),
        ({"experiment": "l1_vgg16_cifar10", "seed": 3}, ["experiment=l1_vgg16_cifar10", "seed=3"]),
        ({"pruner.ratio": {"layer1.*": 0.2, "layer3.*": 0.6}}, ["pruner.ratio={layer1.*: 0.2, layer3.*: 0.6}"]),
        ({"arms": ("retrain@4", "scratch@total:4")}, ["arms=[retrain@4,scratch@total:4]"]),
        ({"dataset.mean": [0.5] * 3, "dataset.std": [0.25] * 3, "deterministic": True, "recipe.lr": 1e-5},
         ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]", "deterministic=true", "recipe.lr=1e-5"]),
        ({"store.root": Path("my 'own' store, \"new\"=1")}, ["store.root='my \\'own\\' store, \"new\"=1'"]),
        ({"pruner.ratio": None, "pruner.target_macs": 0.5}, ["pruner.ratio=null", "pruner.target_macs=0.5"]),
        (TINY, SMALL),
    ],
)  # fmt: skip
def test_it_composes_what_the_command_line_composes(overrides: dict[str, Any] | None, words: list[str]) -> None:
    study = Study(overrides)
    assert study.config == configure(*words)
    assert study.experiment == (overrides or {}).get("experiment")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "vgg17"}, "model=vgg17: no such choice; did you mean vgg"),
        ({"pruner.ratoi": 0.3}, "pruner.ratoi: unknown key; did you mean ratio?"),
        ({"experiment": None}, "must be a string or a list"),
        ({"dataset.root": "${nothing}"}, "'nothing' not found"),
        ({"pruner.ratio": 1.2}, r"pruner.ratio=1.2: must be in \(0, 1\)"),
        ({"pruner.ratio": "0.3,0.5"}, "pruner.ratio=0.3,0.5: must be"),
    ],
)
def test_what_cannot_be_composed_is_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Study(overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert not GlobalHydra.instance().is_initialized()


def test_what_is_no_study_and_what_is_no_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("precious")
    with pytest.raises(UserError, match=r"Study: takes a mapping, .* and not \['seed=1'\]"):
        Study(["seed=1"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"run_study: takes a Study, .* and not {'seed': 1}"):
        run_study({"seed": 1}, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"run_dir=.*/a_file/run: .*/a_file is a file; name a folder"):
        run_study(Study(), tmp_path / "a_file/run")
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_program_that_uses_hydra_itself_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("answer: 42\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert Study().config.seed == 0
        assert compose("mine").answer == 42
    assert not GlobalHydra.instance().is_initialized()


def test_users_add_configurations_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/tiny.yaml").write_text("# @package _global_\npruner:\n  ratio: 0.25\n")
    study = Study({"hydra.searchpath": [f"file://{tmp_path}"], "experiment": "tiny"})
    assert (study.experiment, study.config.pruner.ratio) == ("tiny", 0.25)


def test_its_plan_is_that_of_a_dry_run_and_trains_nothing(tmp_path: Path) -> None:
    overrides = {**TINY, "store.root": tmp_path / "store"}
    plan = Study(overrides).plan()
    assert plan == run_study(Study({**overrides, "dry_run": True}), tmp_path / "run")
    assert plan["pruned"]["known"]
    assert not (tmp_path / "store/stages").exists()


def test_ctrl_c_saves_and_the_same_call_goes_on_from_there_in_another_thread_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study({**TINY, "arms": ["finetune"], "recipe.batch_size": 50, "store.root": tmp_path / "store"})
    steps = 0

    def counting(self: PlainStep, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:  # of eight of the large network
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    real = PlainStep.__call__
    monkeypatch.setattr(PlainStep, "__call__", counting)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match="saved"):
        run_study(study, tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(run_study(study, tmp_path / "run")))
    thread.start()
    thread.join(timeout=120)
    (summary,) = found
    assert steps == 8 + 4
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["arms"]["finetune"]["status"] == "done"
    assert run_study(study, str(tmp_path / "again"))["arms"] == summary["arms"]
    assert steps == 8 + 4, "what the store has is trained again"
