"""Whole small studies: what they record, what they reuse, what they do when something goes wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness import SMALL, configure
from rethink_prune import build_model, load_model
from rethink_prune.errors import UserError
from rethink_prune.models.initialisers import INITIALISERS
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.store.stage import Stage

Run = Callable[..., dict[str, Any]]


def stages(tmp_path: Path) -> dict[str, float]:
    """Return when each stage's weights were written."""
    return {path.parent.name: path.stat().st_mtime for path in (tmp_path / "store/stages").glob("*/model.safetensors")}


COMPILED = """
    from rethink_prune.__main__ import main

    main()
    # Imported here: the folder of compiled code is chosen when it is first looked at.
    from torch._dynamo.utils import counters

    print("compiled", counters["inductor"]["fxgraph_cache_miss"], "found", counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_compiled_code_is_kept_with_the_store_for_other_processes(tmp_path: Path) -> None:
    words = [
        *SMALL,
        "dataset.image_size=32",
        "model=vgg11",
        "arms=[scratch_e]",
        "recipe.epochs=1",
        "accelerate=compile",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    printed = []
    for seed in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COMPILED), *words, f"seed={seed}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines()[-1])
    assert printed == ["compiled 2 found 0", "compiled 0 found 2"]
    (stage, *_) = (tmp_path / "store/stages").iterdir()
    assert yaml.safe_load((stage / "config.yaml").read_text())["computed"]["compiles"] is True


def test_what_a_study_records(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[finetune,scratch_e,scratch_b,large_longer]", "pruner.ratio=0.6")
    plan = json.loads((tmp_path / "run1/plan.json").read_text())
    assert json.loads((tmp_path / "run1/summary.json").read_text()) == summary

    assert summary["study"]["recipe"] == "digits"
    assert summary["study"]["seed"] == 0
    assert set(summary["study"]["versions"]) >= {"python", "torch", "rethink-prune"}
    ratio = plan["large"]["macs"] / plan["pruned"]["macs"]
    longer = int(2 * ratio)
    assert longer > 2, "the arms must differ in their budgets"
    lengths = {name: entry["epochs"] for name, entry in summary["arms"].items()}
    assert lengths == {"finetune": 1, "scratch_e": 2, "scratch_b": longer, "large_longer": longer}

    for name, entry in {"large": summary["large"], **summary["arms"]}.items():
        assert 0 <= entry["top1"] <= entry["top1_best"] <= 100
        network = plan["large"] if name.startswith("large") else plan["pruned"]
        assert (entry["params"], entry["macs"]) == (network["params"], network["macs"])
        assert entry["train_flops"] == 6 * entry["macs"] * 200 * entry["epochs"]
        folder = Path(entry["stage"])
        assert folder.is_absolute()
        assert json.loads((folder / "status.json").read_text())["state"] == "done"
        assert not list(folder.glob("checkpoint-*")), "a finished stage keeps no checkpoints"
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["epoch"]) for row in rows] == list(range(1, entry["epochs"] + 1))
        assert float(rows[-1]["test_top1"]) == entry["top1"]
        assert list((tmp_path / "run1/tensorboard" / name).glob("events*"))
    arms = summary["arms"]
    assert arms["finetune"]["train_flops_total"] == arms["finetune"]["train_flops"] + summary["large"]["train_flops"]
    assert arms["scratch_b"]["train_flops_total"] == arms["scratch_b"]["train_flops"]
    widths = {layer["layer"]: (layer["kept"], layer["full"]) for layer in summary["pruned"]["layers"]}
    assert widths["layer2.0.conv1"] == (12, 32)
    assert "| scratch_b" in (tmp_path / "run1/summary.md").read_text()
    (record,) = (tmp_path / "store/runs").glob("*.json")
    assert set(json.loads(record.read_text())["stages"]) == {"large", "prune", *arms}


def test_a_second_run_trains_nothing_and_one_more_arm_only_that_arm(small_study: Run, tmp_path: Path) -> None:
    first = small_study("arms=[finetune,scratch_e]")
    before = stages(tmp_path)
    again = small_study("arms=[finetune,scratch_e]")
    assert stages(tmp_path) == before
    assert again["arms"] == first["arms"]
    small_study("arms=[finetune,scratch_e,scratch_b]")
    after = stages(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_a_sweep_over_ratios_trains_large_once(small_study: Run, tmp_path: Path) -> None:
    for ratio in (0.3, 0.6):
        small_study(f"pruner.ratio={ratio}", "arms=[finetune]")
    kinds = [name.split("-")[0] for name in stages(tmp_path)]
    assert sorted(kinds) == ["finetune", "finetune", "large", "prune", "prune"]


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ("seed=1", set()),
        ("recipe.lr=0.05", set()),
        ("dataset.train_limit=150", set()),
        ("recipe.finetune.epochs=2", {"large", "prune", "scratch"}),
        ("recipe.finetune.lr=0.02", {"large", "prune", "scratch"}),
        ("recipe.name=other", {"large", "prune", "scratch", "finetune"}),
        ("recipe.eval_batch_size=50", {"large", "prune", "scratch", "finetune"}),
        ("store.checkpoint_seconds=1", {"large", "prune", "scratch", "finetune"}),
        ("pruner.ratio=0.7", {"large"}),
    ],
)
def test_keys_hold_exactly_what_decides_a_result(
    change: str, shared: set[str], small_study: Run, tmp_path: Path
) -> None:
    arms = "arms=[finetune,scratch_e]"
    small_study(arms, "recipe.epochs=1")
    before = set(stages(tmp_path))
    small_study(arms, "recipe.epochs=1", change)
    added = set(stages(tmp_path)) - before
    assert {name.split("-")[0] for name in added} == {"large", "prune", "scratch", "finetune"} - shared


def test_scratch_arms_of_a_predefined_target_need_no_large_network(small_study: Run, tmp_path: Path) -> None:
    alone = small_study("arms=[scratch_e]")
    assert [name.split("-")[0] for name in stages(tmp_path)] == ["scratch"]
    assert "large" not in alone
    after_pruning = small_study("arms=[finetune,scratch_e]")
    assert after_pruning["arms"]["scratch_e"] == alone["arms"]["scratch_e"], "the same architecture, the same stage"
    assert "large" in small_study("arms=[scratch_e]", "large.baseline=true")


def test_scratch_starts_from_a_fresh_draw_of_the_narrow_network(
    small_study: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rethink_prune.study import work as module

    started: dict[str, dict[str, torch.Tensor]] = {}
    real = module.train

    def spy(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        started[kwargs["title"]] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return real(model, *args, **kwargs)

    monkeypatch.setattr(module, "train", spy)
    small_study("model=vgg11", "dataset.image_size=16", "arms=[finetune,scratch_e,scratch_b]", "recipe.epochs=1")

    narrow = NarrowVGG([32, 64, 128, 128, 256, 256, 256, 256])
    with seeded(derive_seed(0, "scratch-init")):
        narrow.draw()
    for a, b in zip(started["scratch_e"].values(), narrow.state_dict().values(), strict=True):
        assert torch.equal(a, b), "bit-identical to the network written by hand"
    for name, tensor in started["scratch_e"].items():
        assert torch.equal(tensor, started["scratch_b"][name]), "Scratch-E and Scratch-B share their initialisation"
    wide = build_model("vgg11")
    with seeded(derive_seed(0, "large-init")):
        INITIALISERS["cifar_vgg"](wide)
    assert torch.equal(started["large"]["features.0.weight"], wide.get_parameter("features.0.weight"))
    sliced = started["large"]["features.25.weight"]
    assert started["scratch_e"]["features.25.weight"].std() > 1.3 * sliced.std(), "not a slice of the wide draw"


class NarrowVGG(torch.nn.Module):
    """VGG-11 with half the channels, written out and initialised by hand."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        nn = torch.nn
        modules: list[torch.nn.Module] = []
        for index, (before, width) in enumerate(zip([3, *widths], widths, strict=False)):
            modules += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index in (0, 1, 3, 5):
                modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Sequential(nn.Linear(widths[-1], 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))

    def draw(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data.normal_(0, (2 / (9 * module.out_channels)) ** 0.5)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.fill_(0.5)
            elif isinstance(module, torch.nn.Linear):
                module.weight.data.normal_(0, 0.01)
                module.bias.data.zero_()


def test_arms_see_the_same_batches(small_study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rethink_prune.training.step import PlainStep

    seen: list[torch.Tensor] = []
    real = PlainStep.__call__
    monkeypatch.setattr(
        PlainStep, "__call__", lambda step, images, *rest: (seen.append(images), real(step, images, *rest))[1]
    )
    small_study("arms=[scratch_e]", "large.baseline=true", "recipe.epochs=1")
    large, scratch = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(large, scratch, strict=True))


def test_every_stage_loads_again_in_a_new_process_to_the_bit(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[finetune]")
    folder = Path(summary["arms"]["finetune"]["stage"])
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load_model(folder)(x)
    code = (
        "import torch, sys; from rethink_prune import load_model\n"
        "x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "torch.save(load_model(sys.argv[1])(x), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert not list((tmp_path / "store").rglob("*.pkl"))


def test_a_diverging_arm_fails_alone(small_study: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune failed: the training loss became nan in epoch 1 at learning rate"):
        small_study("recipe.finetune.lr=1e30", "arms=[finetune,scratch_e]")
    summary = json.loads((tmp_path / "run1/summary.json").read_text())
    failed = summary["arms"]["finetune"]
    assert failed["status"] == "failed"
    assert failed["epoch"] == 1
    assert summary["arms"]["scratch_e"]["status"] == "done"
    assert summary["large"]["status"] == "done"


def test_without_large_the_arms_that_need_it_fail_and_the_others_run(small_study: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"large failed: .*; finetune failed: large failed, so there is no pruned network"
    ):
        small_study("recipe.lr=1e30", "arms=[finetune]")


def test_a_damaged_model_file_is_trained_again(small_study: Run, caplog: pytest.LogCaptureFixture) -> None:
    first = small_study("arms=[scratch_e]")
    stage = Stage(Path(first["arms"]["scratch_e"]["stage"]))
    digest = stage.digest
    stage.model_file.write_bytes(b"garbage")
    again = small_study("arms=[scratch_e]")
    assert f"{stage.model_file} is damaged" in caplog.text
    assert stage.digest == digest, "deterministic on the CPU"
    assert again["arms"]["scratch_e"]["top1"] == first["arms"]["scratch_e"]["top1"]


def test_large_from_a_stage_a_file_and_a_prefixed_torch_file(small_study: Run, tmp_path: Path) -> None:
    trained = small_study("arms=[finetune]")
    folder = Path(trained["large"]["stage"])
    state = load_model(folder).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pt")
    for source in (folder, folder / "model.safetensors", tmp_path / "w.pt"):
        taken = small_study("arms=[finetune]", f"large.checkpoint={source}")
        assert taken["large"]["top1"] == trained["large"]["top1"]
        assert taken["arms"]["finetune"]["top1"] == trained["arms"]["finetune"]["top1"]
        known = source == folder
        assert taken["large"]["train_flops"] == (trained["large"]["train_flops"] if known else None)
        assert (taken["arms"]["finetune"]["train_flops_total"] is not None) == known


def test_checkpoints_that_cannot_be_used(small_study: Run, tmp_path: Path) -> None:
    torch.save(build_model("resnet20"), tmp_path / "pickled.pt")
    torch.save(build_model("resnet32").state_dict(), tmp_path / "other.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "text.txt").write_text("not weights")
    nan = build_model("resnet20").state_dict()
    nan["fc.bias"] = torch.full((10,), float("nan"))
    torch.save(nan, tmp_path / "nan.pt")
    for source, message in {
        "missing.pt": "no such file or folder",
        "pickled.pt": "holds pickled objects, which loading would execute",
        "other.pt": "not the weights of resnet20: layer1.3.conv1.weight is not in resnet20",
        "broken.safetensors": "cannot be read",
        "text.txt": "large.checkpoint",
        "nan.pt": "not the weights of resnet20: fc.bias is not finite",
        ".": "is a folder, but not a finished stage",
    }.items():
        with pytest.raises(UserError, match=message):
            small_study(f"large.checkpoint={tmp_path / source}")
    assert not (tmp_path / "store").exists(), "refused before anything was written"


def test_validation_split_is_held_out_and_selects(small_study: Run) -> None:
    summary = small_study("dataset.validation=0.2", "arms=[scratch_e]", "recipe.epochs=3")
    entry = summary["arms"]["scratch_e"]
    assert entry["selected_epoch"] in (1, 2, 3)
    assert "top1_selected" in entry


def test_a_network_of_ones_own(small_study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "                         nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    summary = small_study("model.name=own_net:net", "+model.args.width=6", "arms=[finetune,scratch_e]")
    assert {layer["layer"]: layer["kept"] for layer in summary["pruned"]["layers"]} == {"0": 3, "3": 6}
    assert "reset_parameters" in summary["study"]["warnings"][0]
    folder = summary["arms"]["finetune"]["stage"]
    with pytest.raises(UserError, match="a network of your own"):
        load_model(folder)
    from own_net import net  # type: ignore[import-not-found]

    assert load_model(folder, factory=net)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=resnet57"], "model.name=resnet57: no such network"),
        (["pruner.ratio=null", "pruner.variant=A"], "pruner.variant=A: l1 has no such variant of resnet20"),
        (
            ["model.init=xavier"],
            "model.init=xavier: no such initialiser (your own: path.to.module:function); ",
        ),
        (["model=vgg16"], "model.name=vgg16: fails on images of 3 x 8 x 8"),
        (["budget.reference_model=vgg17"], "no such network"),
        (["pruner.ratio=null", "pruner.widths=[3,4]"], "pruner.widths: 2 entries for 9 prunable layers"),
        (
            ["pruner.ratio=null", "pruner.target_macs=10"],
            "pruner.target_macs=10: cannot be reached within 1%",
        ),
        (["pruner.skip=['*']"], "pruner.ratio=0.5: removes nothing from resnet20"),
        (["dataset.train_limit=5000"], "dataset.train_limit=5000"),
        (["device=cuda:7"], "device=cuda:7: no such CUDA device"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    overrides: list[str], message: str, small_study: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        small_study(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_targets_in_macs_and_parameters(small_study: Run, tmp_path: Path) -> None:
    for quantity in ("macs", "params"):
        plan = small_study(
            "dry_run=true",
            "model=vgg11",
            "dataset.image_size=16",
            "pruner.ratio=null",
            f"pruner.target_{quantity}=0.5",
        )
        assert plan["pruned"][quantity] == pytest.approx(plan["large"][quantity] / 2, rel=0.01)


def test_published_variant_of_vgg16_keeps_the_largest_filters() -> None:
    config = configure(*SMALL, "model=vgg16", "pruner.ratio=null", "pruner.variant=A")
    from rethink_prune import prune

    model = build_model("vgg16")
    result = prune(model, config.pruner.name, example=torch.zeros(1, 3, 32, 32), variant="A")
    weight = model.get_parameter("features.0.weight").detach()
    kept = weight.abs().sum((1, 2, 3)).topk(32).indices.sort().values
    assert torch.equal(result.model.get_parameter("features.0.weight"), weight[kept])
    assert sum(p.numel() for p in result.model.parameters()) == 5397034
