"""The transfer to detection: what is trained, from what, what is kept, and what goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.detection import FasterRCNN

from harness import configure
from rethink_prune import export, load_model
from rethink_prune.config import TransferConfig
from rethink_prune.detection.task import _DetectorStep
from rethink_prune.errors import UserError
from rethink_prune.store.metrics import read_metrics
from rethink_prune.store.stage import Done, Stage
from rethink_prune.store.weights import load_stage_weights
from rethink_prune.study.detect import _new_detector, _pruned_detector, run_detection
from rethink_prune.study.prepare import PreparedStudy, prepare_study
from rethink_prune.study.run import run_study
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.step import PlainStep

SCENES = ("transfer.scenes=12", "transfer.test_scenes=6")
CLASSIFIED = (
    "experiment=detection_digit_scenes",
    "dataset.train_limit=200",
    "dataset.test_limit=100",
    "recipe.epochs=1",
    "recipe.finetune.epochs=1",
    "precision=fp32",
    "device=cpu",
)
TINY = (*CLASSIFIED, "transfer.epochs=1", *SCENES)
ENTRIES = ["unpruned", "prune_c", "prune_d", "scratch_e", "scratch_b"]
PARTS = ("backbone.body", "roi_heads.box_head.layers")


def run(folder: Path, name: str, *overrides: str, base: Sequence[str] = TINY) -> dict[str, Any]:
    config = configure(*base, f"store.root={folder / 'store'}", *overrides)
    with Interrupts() as interrupts:
        return run_study(config, folder / name, interrupts)


def refuse(*arguments: object) -> None:
    raise AssertionError("trained again")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store that holds a study, finished without a transfer."""
    folder = tmp_path_factory.mktemp("home")
    run(folder, "classified", "transfer=none", base=CLASSIFIED)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> dict[str, Any]:
    """Add the transfer to it; return the summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainStep, "__call__", refuse)  # detectors alone are trained
        return run(home, "transferred")


@pytest.fixture
def trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (PlainStep, _DetectorStep):
        monkeypatch.setattr(step, "__call__", refuse)


def test_every_network_is_transferred(finished: dict[str, Any]) -> None:
    entries = finished["transfer"]
    assert list(entries) == ENTRIES
    for entry in entries.values():
        wanted = {"map", "map_best", "ap", "epochs", "params", "macs", "train_flops", "train_flops_total", "seconds"}
        assert {*wanted, "stage", "status"} <= entry.keys()
        assert entry["status"] == "done"
        assert entry["ap"].keys() <= set("0123456789")
        assert entry["map"] == pytest.approx(sum(entry["ap"].values()) / len(entry["ap"]))
        assert entry["map_best"] >= entry["map"]
        assert entry["train_flops"] == 6 * entry["macs"] * 12
        (row,) = read_metrics(Path(entry["stage"]))
        assert (row["images"], row["test_map"]) == (12, entry["map"])
    small = {name: (entries[name]["params"], entries[name]["macs"]) for name in ENTRIES if name != "unpruned"}
    assert len(set(small.values())) == 1
    assert entries["unpruned"]["macs"] > 2 * small["prune_d"][1]
    total = {name: entries[name]["train_flops_total"] - entries[name]["train_flops"] for name in ENTRIES}
    arms = {name: arm["train_flops_total"] for name, arm in finished["arms"].items()}
    large = finished["large"]["train_flops"]
    assert total == {
        "unpruned": large,
        "prune_c": arms["finetune"],
        # After its training on classification, and that of the detector it goes on from.
        "prune_d": large + entries["unpruned"]["train_flops"],
        "scratch_e": arms["scratch_e"],
        "scratch_b": arms["scratch_b"],
    }
    settings = finished["study"]["settings"]["transfer"]
    assert (settings["name"], settings["test_pictures"]) == ("digit_scenes", 6)
    assert not {"root", "entries"} & settings.keys()


@pytest.mark.usefixtures("trains_nothing")
def test_the_same_command_trains_nothing(home: Path, finished: dict[str, Any]) -> None:
    assert run(home, "again")["transfer"] == finished["transfer"]
    some = run(home, "some", "transfer.entries=[scratch_b,unpruned]")["transfer"]
    assert some == {name: finished["transfer"][name] for name in ("unpruned", "scratch_b")}


@pytest.mark.usefixtures("trains_nothing")
def test_equal_weights_give_an_equal_stage_however_they_were_found(home: Path, finished: dict[str, Any]) -> None:
    given = f"large.checkpoint={finished['large']['stage']}"
    found = run(home, "given", given, "arms=[scratch_e]", "transfer.entries=[unpruned]")
    assert found["large"]["stage"] != finished["large"]["stage"]
    assert found["transfer"]["unpruned"]["stage"] == finished["transfer"]["unpruned"]["stage"]


def tensors(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(entry["stage"]) / "model.safetensors")


def test_detectors_start_from_the_study_and_keep_what_is_frozen(finished: dict[str, Any]) -> None:
    starts = {"unpruned": finished["large"], "prune_c": finished["arms"]["finetune"]}
    starts |= {name: finished["arms"][name] for name in ("scratch_e", "scratch_b")}
    for name, start in starts.items():
        before, after = tensors(start), tensors(finished["transfer"][name])
        for layer in ("features.0.weight", *(f"features.1.{kind}" for kind in ("weight", "bias", "running_var"))):
            assert torch.equal(after[f"backbone.body.{layer}"], before[layer]), (name, layer)
        assert not torch.equal(after["backbone.body.features.14.weight"], before["features.14.weight"])


def test_a_seed_draws_the_same_layers_for_every_network() -> None:
    study, other = (prepare_study(configure(*TINY, f"seed={seed}")) for seed in (0, 1))
    pruned = study.target.known_architecture
    scratch, again = study.networks.scratch(pruned), other.networks.scratch(pruned)
    first, second = (_new_detector(study, network).state_dict() for network in (scratch, again))
    third = _new_detector(other, other.networks.scratch(pruned)).state_dict()
    own = [name for name in first if not name.startswith(PARTS) and name.endswith("weight")]
    assert len(own) == 5
    for name in own:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])


def done(entry: dict[str, Any], *parents: Done) -> Done:
    return Done(Stage(Path(entry["stage"])), entry, parents)


def test_prune_d_prunes_the_detectors_own_weights(home: Path, finished: dict[str, Any]) -> None:
    study = prepare_study(configure(*TINY, f"store.root={home / 'store'}"))
    unpruned = done(finished["transfer"]["unpruned"], done(finished["large"]))
    trained = load_stage_weights(unpruned.stage)
    # As if a longer training had made other channels large.
    inside = [name for name in trained if name.startswith("backbone.body.features") and trained[name].ndim == 4]
    generator = torch.Generator().manual_seed(0)
    for name in inside:
        trained[name] *= torch.rand(len(trained[name]), 1, 1, 1, generator=generator) + 0.5
    expected = study.target.known_architecture
    detector, architecture = _pruned_detector(study, expected, trained, (unpruned,))
    assert architecture.modules == expected.modules
    found = detector.state_dict()
    for name in inside:
        layer, weight = name.removeprefix("backbone.body.").removesuffix(".weight"), trained[name]
        kept, read = architecture.outputs[layer], architecture.inputs.get(layer, torch.arange(weight.shape[1]))
        assert torch.equal(found[name], weight[kept][:, read])
        ranked = weight.abs().sum((1, 2, 3)).argsort(descending=True)[: len(kept)]
        assert sorted(ranked.tolist()) == kept.tolist()
    assert len(inside) == 5
    read = architecture.inputs["classifier.0"]
    assert 0 < len(read) < 48
    for name in ("rpn.head.conv", "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"):
        assert torch.equal(found[f"{name}.weight"], trained[f"{name}.weight"][:, read])
        assert torch.equal(found[f"{name}.bias"], trained[f"{name}.bias"])
    assert torch.equal(found["rpn.head.bbox_pred.weight"], trained["rpn.head.bbox_pred.weight"])
    # Its last state is of that shape, and another one: it was trained.
    last = tensors(finished["transfer"]["prune_d"])
    assert {name: tensor.shape for name, tensor in last.items()} == {n: t.shape for n, t in found.items()}
    assert not torch.equal(last["rpn.head.conv.weight"], found["rpn.head.conv.weight"])


def test_prune_d_has_the_widths_that_the_scores_of_the_study_chose(tmp_path: Path) -> None:
    # The gammas of a detector are frozen; those that a global threshold chose by are of the sparse training.
    found = run(
        tmp_path, "run", "pruner=slimming", "pruner.ratio=0.4", "transfer.entries=[unpruned,prune_d]", "arms=[finetune]"
    )
    widths = {layer["layer"]: (layer["kept"], layer["full"]) for layer in found["pruned"]["layers"]}
    architecture = Architecture.load(Path(found["transfer"]["prune_d"]["stage"]))
    for name, (kept, full) in widths.items():
        assert architecture.modules.get(name, {}).get("out_channels", full) == kept
    assert any(kept < full for kept, full in widths.values())
    assert architecture.modules == Architecture.load(Path(found["arms"]["finetune"]["stage"])).modules
    sparse = found["sparse"]["train_flops"]
    entries = found["transfer"]
    assert entries["prune_d"]["train_flops_total"] == (
        found["large"]["train_flops"] + sparse + sum(entry["train_flops"] for entry in entries.values())
    )


def test_prune_d_needs_no_pruning_of_the_study_where_widths_are_known(
    home: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainStep, "__call__", refuse)
    found = run(home, "alone", "arms=[scratch_e]", "transfer.entries=[unpruned,prune_d]")
    assert list(found["transfer"]) == ["unpruned", "prune_d"]
    assert found["transfer"]["prune_d"]["map"] == finished["transfer"]["prune_d"]["map"]


def prepared(*overrides: str) -> PreparedStudy:
    return prepare_study(configure(*TINY, "transfer.entries=[unpruned]", *overrides))


def key(study: PreparedStudy, start: str = "weights") -> dict[str, Any]:
    """Return the key of the unpruned network's detector, from weights of this digest."""
    (spec,) = study.plan_transfer(study.plan(), None)
    large: Any = SimpleNamespace(stage=SimpleNamespace(digest=start))
    return dict(run_detection(study, spec, {"large": large}, lambda spec: spec).key)  # type: ignore[arg-type, return-value, union-attr]


@pytest.fixture(scope="module")
def usual() -> PreparedStudy:
    return prepared()


@pytest.mark.parametrize(
    "change",
    [
        *({"lr": 0.04}, {"stride": 2}, {"frozen_stages": 0}, {"scenes": 13}, {"test_scenes": 7}, {"epochs": 2}),
        *({"batch_size": 3}, {"clip_norm": 1.0}, {"flip": True}, {"regions": 8}, {"picture_size": 80}),
        *({"score_threshold": 0.1}, {"head": "pool"}, {"weight_decay": 0.0}, {"anchor_ratios": (0.5, 1.0)}),
    ],
)
def test_what_decides_a_detector_is_in_its_key(change: dict[str, Any], usual: PreparedStudy) -> None:
    assert usual.transfer is not None
    options = TransferConfig.model_validate({**usual.transfer.options.model_dump(), **change})
    assert key(replace(usual, transfer=replace(usual.transfer, options=options))) != key(usual)


def test_seed_precision_and_normalisation_are_in_its_key(usual: PreparedStudy) -> None:
    images = prepared("dataset.mean=[0.4,0.4,0.4]", "dataset.std=[0.2,0.2,0.2]")
    found = [key(prepared("seed=1")), key(prepared("precision=bf16")), key(images), key(usual, "other weights")]
    assert key(usual) not in found


def test_what_decides_nothing_is_not_in_its_key(usual: PreparedStudy) -> None:
    # What is pruned, and how long networks are trained, is in their weights.
    other = prepared("accelerate=off", "together=2", "store.root=elsewhere", "pruner.ratio=0.3", "recipe.epochs=2")
    assert key(other) == key(usual)
    assert "device" not in json.dumps(key(usual))


def test_where_pictures_are_is_not_in_a_key(tmp_path: Path) -> None:
    keys = []
    for number, place in enumerate((tmp_path / "here", tmp_path / "there", tmp_path / "there/other")):
        write_voc(place, box=8 + number // 2)
        voc = ("transfer=voc", f"transfer.root={place}", "transfer.stride=4", "transfer.entries=[unpruned]")
        keys.append(key(prepare_study(configure(*CLASSIFIED, *voc))))
    assert keys[0] == keys[1]
    assert keys[2] != keys[0], "another box"


def write_voc(folder: Path, box: int) -> None:
    """Write a picture to train on and one to test with, in VOC's layout."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    mark = f"<xmin>1</xmin><ymin>1</ymin><xmax>{box}</xmax><ymax>9</ymax>"
    size = "<size><width>40</width><height>30</height></size>"
    for name, side in (("a", "trainval"), ("b", "test")):
        (folder / f"ImageSets/Main/{side}.txt").write_text(name)
        (folder / f"Annotations/{name}.xml").write_text(
            f"<annotation>{size}<object><name>cat</name><bndbox>{mark}</bndbox></object></annotation>"
        )
        Image.new("RGB", (40, 30), "grey").save(folder / f"JPEGImages/{name}.jpg")


def test_a_detector_loads_and_finds_what_the_study_found(
    finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("prune_c", "prune_d"):
        entry = finished["transfer"][name]
        model = load_model(entry["stage"])
        assert isinstance(model, FasterRCNN)
        arguments = [entry["stage"], "--evaluate", "transfer=digit_scenes", *SCENES, "--json", str(tmp_path / "found")]
        assert export.main([*arguments, "--device", "cpu", "--precision", "fp32"]) == 0
        found = json.loads((tmp_path / "found").read_text())
        assert found["map"] == pytest.approx(entry["map"], abs=1e-6)
        assert found["ap"] == pytest.approx(entry["ap"], abs=1e-6)
        assert f"on the 6 test pictures of digit_scenes: {entry['map']:.2f} mAP" in capsys.readouterr().out


def test_a_detector_is_copied_with_all_it_takes(finished: dict[str, Any], tmp_path: Path) -> None:
    stage = finished["transfer"]["prune_d"]["stage"]
    assert export.main([stage, "--out", str(tmp_path / "copy")]) == 0
    pictures = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        (expected,), (found,) = (load_model(folder)(pictures) for folder in (stage, tmp_path / "copy"))
    assert len(expected["boxes"])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_failed_arm_fails_its_detector_alone(tmp_path: Path) -> None:
    reason = "finetune failed, so there is no network to start from"
    with pytest.raises(UserError, match=f"detect_prune_c failed: {reason}"):
        run(tmp_path, "run", "recipe.finetune.lr=1e30", "arms=[finetune,scratch_e]")
    entries = json.loads((tmp_path / "run/summary.json").read_text())["transfer"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        **dict.fromkeys(("unpruned", "prune_d", "scratch_e"), "done"),
        "prune_c": "failed",
    }
    assert entries["prune_c"]["reason"] == reason


def test_a_detector_that_diverges_fails_and_what_goes_on_from_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="detect_unpruned failed: the training loss became"):
        run(tmp_path, "run", "transfer.lr=1e30", "transfer.entries=[unpruned,prune_d]", "arms=[scratch_e]")
    entries = json.loads((tmp_path / "run/summary.json").read_text())["transfer"]
    assert (entries["unpruned"]["status"], entries["unpruned"]["epoch"]) == ("failed", 1)
    assert entries["prune_d"]["reason"] == "detect_unpruned failed, so there is no network to start from"


def test_masked_weights_stay_zero_in_detectors(tmp_path: Path) -> None:
    entries = ("pruner=magnitude", "pruner.ratio=0.5", "transfer.entries=[unpruned,prune_c,scratch_e]")
    found = run(tmp_path, "run", "arms=[finetune,scratch_e]", *entries)
    assert list(found["transfer"]) == ["unpruned", "prune_c", "scratch_e"]
    dense = found["transfer"]["unpruned"]
    for entry in (found["transfer"][name] for name in ("prune_c", "scratch_e")):
        weights, masks = tensors(entry), Architecture.load(Path(entry["stage"])).masks
        held = {f"{part}.{n}": m for n, m in masks.items() for part in PARTS if f"{part}.{n}" in weights}
        assert len(held) >= 5
        assert not any(weights[n][~m].any() for n, m in held.items())
        assert sum(int((~m).sum()) for m in held.values()) > 10_000
        assert entry["params"] < dense["params"] - 10_000
        assert entry["macs"] < dense["macs"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("pruner=magnitude", "pruner.ratio=0.5"),
            "transfer: prune_d prunes the detector's channels by their scores, or to known widths, and "
            "pruner=magnitude has neither; leave it out: transfer.entries=[unpruned,prune_c,scratch_e,scratch_b]",
        ),
        (
            ("pruner=sss", "pruner.ratio=null", "model=resnet20"),
            "pruner=sss has neither; leave it out: transfer.entries=[unpruned,prune_c,scratch_e,scratch_b]",
        ),
        (
            ("pruner=uniform", "pruner.ratio=0.5", "arms=[scratch_e]"),
            "pruner=uniform has neither; leave it out: transfer.entries=[unpruned,scratch_e]",
        ),
        (
            ("transfer.entries=[unpruned,lottery]",),
            "transfer.entries: lottery: no such entry in this study; there are: unpruned, prune_c, prune_d, scratch_e, "
            "scratch_b",
        ),
        (
            ("arms=[scratch_e]", "transfer.entries=[prune_c]"),
            "transfer.entries: prune_c: no such entry in this study; add finetune to arms",
        ),
        (
            ("transfer.entries=[prune_d]",),
            "transfer.entries: prune_d goes on from unpruned, which has to be there as well",
        ),
        (("dataset.channels=1",), "transfer: pictures have three channels; take dataset.channels=3"),
        (
            ("transfer.stride=3",),
            "transfer.stride=3: VGG has no features at that stride; it has some at 1, 2, 4",
        ),
        (("transfer.name=coco",), "transfer.name=coco: must be voc or digit_scenes"),
        (
            ("transfer=voc", "transfer.stride=4", "transfer.root=nowhere"),
            "transfer.root=nowhere: no such folder; expected JPEGImages, Annotations and ImageSets/Main there, in "
            "VOC2007 or in VOCdevkit/VOC2007",
        ),
    ],
)
def test_what_cannot_be_transferred_is_refused(overrides: Sequence[str], message: str) -> None:
    base = CLASSIFIED if overrides[0] == "transfer=voc" else TINY
    with pytest.raises(UserError) as error:
        prepare_study(configure(*base, *overrides))
    assert str(error.value).endswith(message)
    assert "\n" not in str(error.value)


def test_a_dry_run_plans_the_detectors(finished: dict[str, Any], tmp_path: Path) -> None:
    planned = run(tmp_path, "plan", "dry_run=true")["transfer"]
    assert json.loads((tmp_path / "plan/plan.json").read_text())["transfer"] == planned
    assert list(planned) == [f"detect_{name}" for name in ENTRIES]
    for name, entry in finished["transfer"].items():
        plan = planned[f"detect_{name}"]
        assert {n: plan[n] for n in ("epochs", "params", "macs", "train_flops")} == {
            n: entry[n] for n in ("epochs", "params", "macs", "train_flops")
        }
    assert planned["detect_prune_d"]["starts_from"] == "detect_unpruned"
    # What a training has to show first is not known.
    unknown = run(tmp_path, "scores", "dry_run=true", "pruner=slimming", "pruner.ratio=0.4")["transfer"]
    assert unknown["detect_prune_c"]["train_flops"] is None
    assert unknown["detect_prune_c"]["epochs"] == 1
    assert unknown["detect_unpruned"]["train_flops"] == planned["detect_unpruned"]["train_flops"]


# Kills itself as a detector's training makes a given step.
KILLER = """
    import os, signal, sys
    from rethink_prune.__main__ import main
    from rethink_prune.detection.task import _DetectorStep

    last, made, plain = int(sys.argv.pop(1)), 0, _DetectorStep.__call__

    def step(*arguments):
        global made
        made += 1
        if made == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    _DetectorStep.__call__ = step
    sys.argv[0] = "rethink_prune"
    main()
"""
# Three steps an epoch, and mirror images: six.
KILLED = (*TINY, "transfer.epochs=2", "transfer.flip=true", "store.checkpoint_seconds=0", "arms=[scratch_e]")


def killed_at(cwd: Path, step: int) -> int:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(step), *KILLED, "transfer.entries=[unpruned,prune_d]"],
        cwd=cwd,
        capture_output=True,
        timeout=240,
        check=False,
    )
    return process.returncode


def kept(cwd: Path) -> dict[str, tuple[bytes, list[dict[str, float]]]]:
    return {
        folder.name: (
            (folder / "model.safetensors").read_bytes(),
            [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(folder)],
        )
        for folder in (cwd / "store/stages").glob("detect-*")
    }


@pytest.mark.slow
def test_a_killed_detector_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert killed_at(whole, 0) == 0
    # In the second epoch of the first detector, then in the first one of what goes on from it: 12 steps each.
    assert killed_at(broken, 9) == -signal.SIGKILL
    assert killed_at(broken, 6) == -signal.SIGKILL
    assert killed_at(broken, 0) == 0
    assert len(kept(whole)) == 2
    assert kept(broken) == kept(whole)


@pytest.mark.slow
def test_two_processes_train_all_detectors(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "rethink_prune", *TINY, "hydra.run.dir=run"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "run/summary.json").read_text())["transfer"]
    assert list(entries) == ENTRIES
    for entry in entries.values():
        assert (entry["status"], entry["processes"]) == ("done", [2])
        (row,) = read_metrics(tmp_path / entry["stage"])
        assert row["images"] == 12
        assert isinstance(load_model(tmp_path / entry["stage"]), FasterRCNN)
    # Judged by both processes together, as one does alone.
    stage = str(tmp_path / entries["prune_d"]["stage"])
    found = tmp_path / "found"
    arguments = [stage, "--evaluate", "transfer=digit_scenes", *SCENES, "--json", str(found)]
    assert export.main([*arguments, "--device", "cpu", "--precision", "fp32"]) == 0
    assert json.loads(found.read_text())["map"] == pytest.approx(entries["prune_d"]["map"], abs=1e-6)
