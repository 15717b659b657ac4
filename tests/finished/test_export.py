"""What can be done with finished stages: export, ONNX, evaluation, and what they cost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from harness import SMALL, configure
from rethink_prune import build_model, load_model
from rethink_prune.errors import UserError
from rethink_prune.export import main
from rethink_prune.files import file_digest
from rethink_prune.finished.export import ONNX_TOLERANCE, export_onnx
from rethink_prune.study.pretrained import read_checkpoint
from rethink_prune.study.run import run_study
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.interrupts import Interrupts

ON_CPU = ("--device", "cpu", "--precision", "fp32")
DIGITS = ("dataset=digits", "dataset.image_size=8", "dataset.test_limit=100")
KINDS = {
    "channels": ("arms=[finetune]",),
    "masks": ("pruner=magnitude", "pruner.ratio=0.5", "arms=[finetune]"),
    "selections": ("model=preresnet20", "pruner=slimming", "pruner.ratio=0.4", "arms=[finetune]"),
}
OWN_NET = """
from torch import nn
def net(num_classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))
def narrow(num_classes, width=8):
    return net(num_classes, width // 3)
def broken(num_classes, width=8):
    raise RuntimeError("no such luck")
"""
Runs = Mapping[str, dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store and one finished run of each kind."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def runs(home: Path) -> Runs:
    """Train one small study of each kind; return their summaries."""
    summaries = {}
    for name, overrides in KINDS.items():
        config = configure(*SMALL, "recipe.epochs=1", f"store.root={home / 'store'}", *overrides)
        with Interrupts() as interrupts:
            summaries[name] = run_study(config, home / name, interrupts)
    return summaries


def finetuned(runs: Runs, kind: str) -> Path:
    return Path(runs[kind]["arms"]["finetune"]["stage"])


def copy(stage: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stage, tmp_path / stage.name)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_all_it_takes_without_the_store(kind: str, runs: Runs, home: Path, tmp_path: Path) -> None:
    stage, out = finetuned(runs, kind), tmp_path / "exported"
    assert main([str(stage), "--out", str(out)]) == 0
    images = torch.randn(4, 3, 8, 8)
    expected = logits(load_model(stage), images)
    assert torch.equal(logits(load_model(out), images), expected)
    name = "preresnet20" if kind == "selections" else "resnet20"
    rebuilt = reshape(build_model(name), Architecture.load(out))
    rebuilt.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    assert torch.equal(logits(rebuilt.eval(), images), expected)
    for file in out.iterdir():
        assert str(home).encode() not in file.read_bytes()
    extra = {"architecture.safetensors"} if kind != "channels" else set()
    files = {"model.safetensors", "architecture.json", "sample.safetensors", "config.yaml", "status.json"} | extra
    assert {file.name for file in out.iterdir()} == files


def test_masked_weights_are_exported_as_zeros(runs: Runs, tmp_path: Path) -> None:
    stage = copy(finetuned(runs, "masks"), tmp_path)
    state = safetensors.torch.load_file(stage / "model.safetensors")
    masks = Architecture.load(stage).masks
    for name, mask in masks.items():
        state[name] += ~mask  # as if training had let them go
    safetensors.torch.save_file(state, stage / "model.safetensors")
    (stage / "sample.safetensors").unlink()  # it would tell that the network is another one now
    status = json.loads((stage / "status.json").read_text())
    del status["digests"]["sample.safetensors"]
    status["digests"]["model.safetensors"] = file_digest(stage / "model.safetensors")
    (stage / "status.json").write_text(json.dumps(status))
    assert main([str(stage), "--out", str(tmp_path / "out")]) == 0
    exported = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert masks
    for name, mask in masks.items():
        assert not exported[name][~mask].any()
        assert torch.equal(exported[name][mask], state[name][mask])
    assert load_model(tmp_path / "out")


def test_an_exported_network_can_be_pruned_again_in_a_study(runs: Runs, tmp_path: Path) -> None:
    stage, out = Path(runs["channels"]["large"]["stage"]), tmp_path / "large"
    assert main([str(stage), "--out", str(out)]) == 0
    checkpoint = read_checkpoint(str(out), build_model("resnet20"), "resnet20")
    assert checkpoint.result["train_flops"] == runs["channels"]["large"]["train_flops"]


def test_an_export_goes_beside_where_one_works_and_overwrites_only_itself(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stage, other = finetuned(runs, "channels"), finetuned(runs, "masks")
    assert main([str(stage)]) == main([str(stage)]) == 0
    out = Path("export") / stage.name
    assert load_model(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("precious")
    before = {path: path.read_bytes() for folder in (out, other, tmp_path / "mine") for path in folder.iterdir()}
    capsys.readouterr()
    for folder in (out, other, tmp_path / "mine"):
        assert main([str(other), "--out", str(folder)]) == 1
        assert "holds something else already" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("kind", ["channels", "selections"])
def test_onnx_computes_what_torch_does_for_batches_of_any_size(
    kind: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    stage, file = finetuned(runs, kind), tmp_path / "onnx/model.onnx"
    file.parent.mkdir()
    assert main([str(stage), "--out", str(tmp_path / "out"), "--onnx", str(file)]) == 0
    assert "logits differ from torch's by" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = load_model(stage)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        expected = logits(model, images)
        assert (torch.from_numpy(found) - expected).abs().max() <= ONNX_TOLERANCE * expected.abs().max()


class Restless(nn.Module):
    """Gives other logits every time."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) + torch.randn_like(images.flatten(1))


class Unwritable(nn.Module):
    """Has no logits that depend on the images alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * float(np.random.default_rng().random()) if images.sum() > 0 else images.flatten(1)


@pytest.mark.parametrize(
    ("model", "message"), [(Restless(), "not written: as ONNX, logits differ by"), (Unwritable(), "cannot be written")]
)
def test_what_onnx_gets_wrong_is_not_written(model: nn.Module, message: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    with pytest.raises(UserError, match=message) as error:
        export_onnx(model.eval(), (1, 2, 2), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_onnx_one_line_says_what_to_install(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = [str(finetuned(runs, "channels")), "--out", str(tmp_path / "out"), "--onnx", str(tmp_path / "m.onnx")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == "--onnx needs onnxruntime: pip install 'rethink-prune[onnx]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_finds_what_the_study_found(
    kind: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are normalised as in training, though other training images are asked for here."""
    for entry in (runs[kind]["arms"]["finetune"], runs[kind]["large"]):
        arguments = [entry["stage"], *ON_CPU, "--json", str(tmp_path / "found.json"), "--evaluate", *DIGITS]
        assert main([*arguments, "dataset.train_limit=100"]) == 0
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["images"] == 100
        assert found["top1"] == entry["top1"]
        assert found["top5"] == entry["top5"]
        assert found["loss"] == pytest.approx(entry["loss"], rel=1e-5)
        assert f"top-1 {entry['top1']:.2f} %, top-5 {entry['top5']:.2f} %, loss" in capsys.readouterr().out


def test_evaluation_on_images_of_ones_own(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_images.py").write_text(
        "import numpy as np\n"
        "def images(root):\n"
        "    draw = np.random.default_rng(0)\n"
        "    part = lambda n: (draw.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), np.arange(n) % 10)\n"
        "    return {'train': part(20), 'test': part(37), 'classes': list('abcdefghij')}\n"
    )
    monkeypatch.chdir(tmp_path)
    stage = finetuned(runs, "channels")
    settings = ("dataset.name=own_images:images", "dataset.image_size=null", "dataset.mean=[0,0,0]")
    evaluation = ["--evaluate", *settings, "dataset.std=[1,1,1]"]
    assert main([str(stage), *ON_CPU, "--json", "found.json", *evaluation]) == 0
    found = json.loads(Path("found.json").read_text())
    from own_images import images  # type: ignore[import-not-found]

    pixels, labels = images(None)["test"]
    expected = logits(load_model(stage), torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    target = torch.from_numpy(labels)
    assert found["images"] == 37
    assert found["top1"] == pytest.approx(100 * (expected.argmax(1) == target).double().mean().item())
    within = (expected.topk(5).indices == target[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * within.double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(expected, target).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=cifar10"], "it has 32 pixels a side (dataset.image_size), not 8"),
        (["dataset=cifar100"], "it has 100 classes, not 10 and 32 pixels"),
        ([*DIGITS, "dataset.channels=1"], "it has 1 channels (dataset.channels), not 3"),
        ([*DIGITS, "dataset.channels=2"], "dataset.channels=2: must be 1 or 3"),
        (["dataset=cifar11"], "cifar11"),
        (["dataset=digits", "dataset.nonsense=1"], "nonsense"),
        (["dataset=digits", "+dataset.nonsense=1"], "dataset.nonsense: unknown key"),
        (["dataset=digits", "dataset.args={"], "dataset.args={"),
        (["dataset=folder", "dataset.root=nowhere"], "nowhere: no such folder"),
        (["dataset.image_size=8"], "name the data set first"),
        (["dataset=digits", "model=vgg11"], "--evaluate model=vgg11: only the data set can be set"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused_in_one_line(
    overrides: list[str], message: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([str(finetuned(runs, "channels")), *ON_CPU, "--evaluate", *overrides]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def spoil(stage: Path, how: str) -> None:
    match how:
        case "running" | "failed" | "stopped":
            (stage / "status.json").write_text(json.dumps({"state": how}))
        case "no status":
            (stage / "status.json").unlink()
        case "damaged status":
            (stage / "status.json").write_text('{"state": "done", ')
        case "list":
            (stage / "status.json").write_text("[]")
        case "damaged weights":
            content = bytearray((stage / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (stage / "model.safetensors").write_bytes(content)
        case "no weights":
            (stage / "model.safetensors").unlink()
        case "no network":
            (stage / "config.yaml").write_text("key: 1\n")
        case "no numbers":
            (stage / "config.yaml").write_text((stage / "config.yaml").read_text().replace("size: 8", "size: [8]"))
        case "binary":
            (stage / "config.yaml").write_bytes(bytes(range(256)))
        case "python in yaml":
            (stage / "config.yaml").write_text("!!python/object/apply:os.mkdir [pwned]\n")
        case "other format":
            _rewrite(stage, {"format": "rethink-prune architecture 99"})
        case "other network":
            config = (stage / "config.yaml").read_text()
            (stage / "config.yaml").write_text(config.replace("name: resnet20", "name: vgg11", 1))


def _rewrite(stage: Path, changes: dict[str, Any]) -> None:
    path = stage / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    status = json.loads((stage / "status.json").read_text())
    status["digests"]["architecture.json"] = file_digest(path)
    (stage / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("running", "not a finished stage (state: running)"),
        ("failed", "not a finished stage (state: failed)"),
        ("stopped", "not a finished stage (state: stopped)"),
        ("no status", "is no stage: there is no status.json in it"),
        ("damaged status", "status.json: is damaged"),
        ("list", "status.json: is damaged"),
        ("damaged weights", "model.safetensors: is damaged (its checksum does not match)"),
        ("no weights", "model.safetensors: is damaged (its checksum does not match)"),
        ("no network", "config.yaml: is damaged or of another version: it describes no network"),
        ("no numbers", "config.yaml: is damaged or of another version: it describes no network"),
        ("binary", "config.yaml: is damaged or of another version: it describes no network"),
        ("python in yaml", "config.yaml: is damaged or of another version: it describes no network"),
        ("other format", "not a file of the format"),
        ("other network", "model.detach_shortcut: vgg11 has no such option"),
    ],
)
@pytest.mark.parametrize("action", [[], ["--evaluate", *DIGITS], ["--cost"]], ids=["export", "evaluate", "cost"])
def test_stages_that_cannot_be_used_are_refused_in_one_line(
    how: str, message: str, action: list[str], runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = copy(finetuned(runs, "channels"), tmp_path)
    spoil(stage, how)
    capfd.readouterr()
    target = [] if action else ["--out", str(tmp_path / "out")]
    assert main([str(stage), *ON_CPU, *action, *target]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {stage.name}


def test_weights_of_another_network_are_refused_in_one_line(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = copy(finetuned(runs, "channels"), tmp_path)
    config = (stage / "config.yaml").read_text()
    (stage / "config.yaml").write_text(config.replace("name: resnet20", "name: resnet32", 1))
    capsys.readouterr()
    assert main([str(stage), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "holds other weights than ResNet has" in error
    assert error.count("\n") == 1


def test_a_run_or_a_store_in_a_stages_place(runs: Runs, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(home / "channels")]) == 1
    error = capsys.readouterr().err
    assert "is a run; give one of its stages: " in error
    assert str(finetuned(runs, "channels")) in error
    assert main([str(home / "store")]) == 1
    assert "is no stage" in capsys.readouterr().err
    assert main([str(home / "nowhere")]) == 1
    assert capsys.readouterr().err == f"{home / 'nowhere'}: no such folder\n"


@pytest.fixture
def own_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train a network of one's own; return a stage of its pruned form."""
    (tmp_path / "own_export_net.py").write_text(OWN_NET)
    monkeypatch.chdir(tmp_path)
    options = ("model.name=own_export_net:net", "+model.args.width=6", "arms=[scratch_e]", "recipe.epochs=1")
    with Interrupts() as interrupts:
        summary = run_study(
            configure(*SMALL, f"store.root={tmp_path / 'store'}", *options), tmp_path / "run", interrupts
        )
    return Path(summary["arms"]["scratch_e"]["stage"])


def test_a_network_of_ones_own_is_built_by_what_the_user_names(
    own_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([str(own_stage)]) == 1
    assert "holds own_export_net:net, a network of your own" in capsys.readouterr().err
    named = [str(own_stage), "--factory", "own_export_net:net"]
    assert main([*named, "--out", "exported"]) == 0
    from own_export_net import net  # type: ignore[import-not-found]

    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(logits(load_model("exported", factory=net), images), logits(load_model(own_stage, net), images))
    assert main([*named, *ON_CPU, "--evaluate", *DIGITS]) == 0
    for factory, message in {
        "own_export_net:narrow": "must be between 1 and 2",
        "own_export_net:broken": "the factory failed with RuntimeError: no such luck",
        "own_export_net:nothing": "own_export_net has no nothing",
        "no.such.module:net": "no module named no",
        "torch:zeros": "the factory failed with",
    }.items():
        capsys.readouterr()
        assert main([str(own_stage), "--factory", factory]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("factory", [[], ["--factory", "own_export_net:net"]])
def test_what_a_stage_names_is_never_imported(factory: list[str], own_stage: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('pwned', 'w')\nfrom own_export_net import net\n")
    config = own_stage / "config.yaml"
    text = config.read_text().replace("own_export_net:net", "evil:net")
    config.write_text(text.replace("images:\n", "images:\n  name: evil:net\n"))
    assert main([str(own_stage), *factory, "--out", "exported"]) == (0 if factory else 1)
    assert main([str(own_stage), *factory, *ON_CPU, "--evaluate", *DIGITS]) == (0 if factory else 1)
    assert "evil" not in sys.modules
    assert not (tmp_path / "pwned").exists()


def test_cost_compares_large_with_pruned_and_leaves_it_in_the_run(
    runs: Runs, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([str(home / "channels"), *ON_CPU, "--cost", "--rounds", "3"]) == 0
    content = json.loads((home / "channels/cost.json").read_text())
    summary = runs["channels"]
    assert content["rounds"] == 3
    assert not content["masked"]
    for name in ("large", "pruned"):
        found = content["networks"][name]
        assert found["params"] == summary[name]["params"]
        assert found["macs"] == summary[name]["macs"]
        file = Path(summary[name]["stage"]) / "model.safetensors"
        assert found["weights_bytes"] == pytest.approx(file.stat().st_size, abs=16)
        for batch in ("1", "128"):
            seconds = found["batches"][batch]["seconds"]
            assert 0 < seconds["least"] <= seconds["median"] <= seconds["greatest"]
            rate = found["batches"][batch]["images_per_second"]
            assert rate["median"] == pytest.approx(int(batch) / seconds["median"])
    large, pruned = (content["networks"][name]["batches"]["128"] for name in ("large", "pruned"))
    assert large["peak_memory_bytes"] > pruned["peak_memory_bytes"]
    least = large["seconds"]["least"] / pruned["seconds"]["greatest"]
    greatest = large["seconds"]["greatest"] / pruned["seconds"]["least"]
    assert least <= content["speedup"]["128"]["median"] <= greatest
    table = capsys.readouterr().out
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]] == [
        *("resnet20", "large", "pruned", "large / pruned")
    ]
    assert "n = 3 rounds" in table
    assert "Zeros" not in table


def test_cost_says_that_zeros_save_no_time(runs: Runs, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert (
        main([str(finetuned(runs, "masks")), *ON_CPU, "--cost", "--rounds", "1", "--json", str(home / "m.json")]) == 0
    )
    content = json.loads((home / "m.json").read_text())
    large, pruned = content["networks"]["large"], content["networks"]["pruned"]
    assert pruned["params"] == runs["masks"]["pruned"]["params"] < large["params"]
    assert pruned["weights_bytes"] == large["weights_bytes"]
    assert pruned["batches"]["1"]["peak_memory_bytes"] == large["batches"]["1"]["peak_memory_bytes"]
    assert "Zeros do not make dense kernels faster" in capsys.readouterr().out


def test_cost_of_an_unpruned_network_stands_alone(runs: Runs, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [runs["channels"]["large"]["stage"], "--cost", "--rounds", "1", "--device", "cpu"]
    assert main([*arguments, "--precision", "bf16", "--json", str(home / "large.json")]) == 0
    content = json.loads((home / "large.json").read_text())
    assert list(content["networks"]) == ["large"]
    assert content["precision"] == "bf16"
    assert content["speedup"] == {}
    assert "large / pruned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "summary.json: is damaged"),
        ("[]", "summary.json: is damaged"),
        ("{}", "no finished stage with the pruned"),
    ],
)
def test_cost_of_a_run_without_a_pruned_network(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(content)
    assert main([str(tmp_path), "--cost"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cost", "--evaluate", "dataset=digits"],
        ["--cost", "--rounds", "0"],
        ["--cost", "--device", "tpu"],
        ["--evaluate"],
    ],
)
def test_options_that_make_no_sense_end_with_the_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["somewhere", *arguments])
    assert end.value.code == 2


@pytest.mark.parametrize("arguments", [["--json", "x.json"], ["--cost", "--out", "x"]])
def test_options_of_another_action_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *arguments]) == 1
    assert "go" in capsys.readouterr().err
