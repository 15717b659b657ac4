"""Cutting, rebuilding from data in another process, and what surgery leaves as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from harness import mask
from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.surgery.architecture import Architecture, select_inputs
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply, reshape

IMAGE = (2, 3, 8, 8)


class Edited(nn.Module):
    """Every kind of constant in one forward pass, a selection, a buffer and an unused layer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.e = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(3, 12, 3, padding=1)
        self.d = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(12 * 16 + 6 * 16, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        selected = F.max_pool2d(self.b(self.norm(y := self.a(x))) + self.e(y), 2)
        wide = F.max_pool2d(self.c(x) + F.pad(self.d(x), (0, 0, 0, 0, 0, 4)), 2)
        parts = wide.chunk(3, dim=1)
        wide = torch.cat([parts[0] * self.scale, parts[1], wide[:, 8:10], wide.narrow(1, 10, 2)], 1)
        features = torch.cat([wide.view(-1, 192), selected.reshape((x.shape[0], 96))], 1)
        return self.out(F.relu(self.hidden(features)) * torch.tensor(0.5))


def build_edited() -> Edited:
    torch.manual_seed(0)
    return Edited().eval()


def build(name: str) -> nn.Module:
    """Build a network at full width, in this process or another."""
    if name == "edited":
        return build_edited()
    return (models.mobilenet_v2() if name == "mobilenet_v2" else build_model(name)).eval()


OF_C = {"c": [0, 1], "c#2": [3], "c#3": [1], "c#4": [0]}
DROP = {"norm.selected": [1, 2, 5, 6], "b": [0, 5], **OF_C, "hidden": [2, 3, 4]}


def pruned_edited() -> tuple[Edited, nn.Module, Architecture]:
    model = build_edited()
    return model, *apply(model, analyse(model, torch.randn(IMAGE), selecting="norm").plan(DROP))


def test_all_kinds_of_edits_at_once() -> None:
    model, pruned, architecture = pruned_edited()
    channels = analyse(model, torch.randn(IMAGE), selecting="norm")
    x = torch.randn(IMAGE)
    assert {edit["kind"] for edit in architecture.edits.values()} == {
        "pad",
        "split",
        "slice",
        "narrow",
        "size",
    }
    with torch.no_grad():
        assert torch.allclose(pruned(x), mask(model, channels, DROP)(x), atol=1e-6)


def test_edited_network_keeps_keys_order_and_modules() -> None:
    model, pruned, _ = pruned_edited()
    assert isinstance(pruned, type(model))
    assert type(pruned) is not type(model)
    assert type(pruned).__name__ == "Edited"
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert [name for name, _ in pruned.named_modules()] == [name for name, _ in model.named_modules()]
    assert "scale" in dict(pruned.named_buffers())


@pytest.mark.parametrize("batch", [1, 3])
def test_edited_network_takes_other_batches(batch: int) -> None:
    _, pruned, _ = pruned_edited()
    assert pruned(torch.randn(batch, *IMAGE[1:])).shape == (batch, 5)


# ---- rebuilding ------------------------------------------------------------------------------------------


def test_architecture_round_trip_in_a_new_process(tmp_path: Path) -> None:
    for name in ("resnet20", "vgg11", "mobilenet_v2", "edited"):
        model, x = build(name), torch.randn(IMAGE if name == "edited" else (2, 3, 32, 32))
        channels = analyse(model, x)
        drop = {group.name: range(0, group.size // 2) for group in channels.groups("all")}
        pruned, architecture = apply(model, channels.plan(drop))
        folder = tmp_path / name
        folder.mkdir()
        architecture.save(folder)
        state = {key: tensor.contiguous() for key, tensor in pruned.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        with torch.no_grad():
            save_file({"x": x, "y": pruned(x)}, folder / "example.safetensors")
    script = """
        import sys
        from importlib.util import module_from_spec, spec_from_file_location
        from pathlib import Path
        import torch
        from safetensors.torch import load_file
        from rethink_prune.surgery.architecture import Architecture
        from rethink_prune.surgery.cut import reshape

        spec = spec_from_file_location("test_surgery", sys.argv[2])
        tests = module_from_spec(spec)
        spec.loader.exec_module(tests)
        torch.set_num_threads(int(sys.argv[3]))  # sums are split over the threads, so the last bit depends on them
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            full = tests.build(folder.name)
            model = reshape(full, Architecture.load(folder)).eval()
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
            example = load_file(folder / "example.safetensors")
            with torch.no_grad():
                assert torch.equal(model(example["x"]), example["y"]), folder.name
    """
    arguments = [str(tmp_path), __file__, str(torch.get_num_threads())]
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    # There, this file finds the harness.
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert finished.returncode == 0, finished.stderr


def test_empty_architecture_is_the_full_network(tmp_path: Path) -> None:
    Architecture().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["architecture.json"]
    model = build_model("vgg11")
    rebuilt = reshape(model, Architecture.load(tmp_path))
    rebuilt.load_state_dict(model.state_dict())


def test_file_is_deterministic(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pruned_edited()[2].save(tmp_path / name)
        texts.append((tmp_path / name / "architecture.json").read_bytes())
        tensors = load_file(tmp_path / name / "architecture.safetensors")
        assert {key.partition("/")[0] for key in tensors} == {"selections", "outputs", "inputs"}
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "damaged or incomplete: FileNotFoundError"),
        ("{", "damaged or incomplete: JSONDecodeError"),
        ("[]", "not a file of the format"),
        ('{"format": "another"}', "not a file of the format"),
        ('{"format": "rethink-prune architecture 2"}', "damaged or incomplete: KeyError"),
        (
            '{"format": "rethink-prune architecture 2", "modules": [], "edits": {}, "selections": []}',
            "damaged or incomplete: ValueError",
        ),
        (
            '{"format": "rethink-prune architecture 2", "modules": {}, "edits": {}, "selections": ["a"], "masks": []}',
            "damaged or incomplete: FileNotFoundError",
        ),
    ],
)
def test_damaged_files_are_refused_with_their_path(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Architecture.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modules": {"stem": {"out_channels": 4}}}, r"VGG: has no stem.out_channels"),
        ({"modules": {"features.0": {"weight": 4}}}, r"VGG: has no features.0.weight"),
        (
            {"modules": {"features.0": {"out_channels": 65}}},
            "features.0.out_channels=65: must be between 1 and 64",
        ),
        ({"modules": {"features.0": {"out_channels": "4"}}}, "features.0.out_channels=4: must be between"),
        ({"selections": {"select": torch.tensor([0])}}, "VGG: has no select, which the architecture changes"),
        ({"removed": ("layer1.0",)}, "VGG: has no layer1.0, which the architecture changes"),
        ({"masks": {"features.0.wait": torch.tensor([True])}}, "VGG: has no features.0.wait, which"),
        (
            {"edits": {"view": {"kind": "size", "position": 1, "counts": [4]}}},
            "VGG: its graph has no view, which the architecture changes",
        ),
    ],
)
def test_architecture_of_another_network_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reshape(build_model("vgg11"), Architecture(**content))


# ---- what stays as it was --------------------------------------------------------------------------------


def prune_first(model: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32)) -> nn.Module:
    channels = analyse(model, torch.randn(shape))
    return apply(model, channels.plan({channels.groups()[0].name: [0, 1]}))[0]


def test_inherited_weights_are_the_kept_slices() -> None:
    model = build_model("vgg11")
    pruned = prune_first(model)
    before, after = model.state_dict(), pruned.state_dict()
    assert torch.equal(after["features.0.weight"], before["features.0.weight"][2:])
    assert torch.equal(after["features.1.running_var"], before["features.1.running_var"][2:])
    assert torch.equal(after["features.4.weight"], before["features.4.weight"][:, 2:])
    assert torch.equal(after["features.8.weight"], before["features.8.weight"])
    assert after["features.8.weight"].data_ptr() != before["features.8.weight"].data_ptr()


def test_flags_dtype_and_layout_are_kept() -> None:
    model = build_model("vgg11").to(torch.bfloat16).to(memory_format=torch.channels_last)
    model.get_parameter("features.0.weight").requires_grad_(False)
    model.get_submodule("features.1").eval()
    pruned = prune_first(model)
    frozen, trained = pruned.get_parameter("features.0.weight"), pruned.get_parameter("features.4.weight")
    assert isinstance(trained, nn.Parameter)
    assert (frozen.requires_grad, trained.requires_grad) == (False, True)
    assert trained.dtype == torch.bfloat16
    assert trained.is_contiguous(memory_format=torch.channels_last)
    assert pruned.training
    assert not pruned.get_submodule("features.1").training
    assert all(p.is_contiguous() for p in prune_first(build_model("vgg11")).parameters())


def test_surgery_works_on_shapes_alone() -> None:
    with torch.device("meta"):
        model = build_model("resnet20")
    pruned = prune_first(model)
    assert all(parameter.is_meta for parameter in pruned.parameters())
    assert pruned.get_parameter("layer1.0.conv1.weight").shape[0] == 14


def test_gradients_reach_every_parameter_of_the_pruned_network() -> None:
    pruned = prune_first(build_model("resnet20")).train()
    pruned(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())


def test_pruning_twice_adds_up() -> None:
    model = build_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    channels = analyse(model, x)
    once, _ = apply(model, channels.plan({"layer1.0.conv1": [0, 5], "conv1": [3]}))
    twice, _ = apply(once, analyse(once, x).plan({"layer1.0.conv1": [0], "conv1": [3]}))
    direct, _ = apply(model, channels.plan({"layer1.0.conv1": [0, 1, 5], "conv1": [3, 4]}))
    with torch.no_grad():
        assert torch.equal(twice(x), direct(x))


# ---- never silently wrong --------------------------------------------------------------------------------


def test_forward_that_computes_with_a_width_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.a.out_channels**-0.5)

    with pytest.raises(UserError, match=r"Scaled: cannot be pruned: mul depends on the width of a layer"):
        prune_first(Scaled(), IMAGE)


def test_plan_for_another_network_is_refused() -> None:
    plan = analyse(build_model("vgg11"), torch.randn(1, 3, 32, 32)).plan({"features.0": [0]})
    with pytest.raises((UserError, AttributeError)):
        apply(build_model("resnet20"), plan)


def test_selection_compiles_to_an_index_select() -> None:
    norm = nn.BatchNorm2d(2).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = norm(x[:, [2, 0]])
    select_inputs(norm, torch.tensor([2, 0]))
    assert torch.equal(norm(x), expected)
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), expected)


def test_selection_is_no_part_of_the_state_dict_but_of_copies() -> None:
    norm = nn.BatchNorm2d(2)
    keys = list(norm.state_dict())
    select_inputs(norm, torch.tensor([2, 0]))
    assert list(norm.state_dict()) == keys
    clone = copy.deepcopy(norm)
    select_inputs(clone, torch.tensor([0, 1]))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(clone.eval()(x), nn.BatchNorm2d(2).eval()(x[:, :2]))
    assert norm.get_buffer("selected").tolist() == [2, 0]


def test_masks_survive_the_file(tmp_path: Path) -> None:
    mask_of = {"features.0.weight": torch.rand(64, 3, 3, 3) < 0.5}
    Architecture(masks=mask_of, removed=("a.b",)).save(tmp_path)
    loaded = Architecture.load(tmp_path)
    assert loaded.removed == ("a.b",)
    assert torch.equal(loaded.masks["features.0.weight"], mask_of["features.0.weight"])
