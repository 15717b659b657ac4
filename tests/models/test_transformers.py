"""Transformers and ConvNeXt: the same as timm's, drawn anew at any width, and stochastic depth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import randomise
from rethink_prune import build_model, prune
from rethink_prune.errors import UserError
from rethink_prune.models.blocks import DropPath, drop_paths
from rethink_prune.models.initialisers import initialiser
from rethink_prune.seeds import seeded
from rethink_prune.surgery.graph import have_same_calls, trace

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny": {"dim": 32, "depth": 2, "heads": 4, "image_size": 16},
    "convnext_atto": {"width": 8, "stages": 3},
}
IMAGES = (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("vit_tiny", {}, {"img_size": 32, "patch_size": 4, "embed_dim": 192, "num_heads": 3}),
        ("vit_small", {}, {"img_size": 32, "patch_size": 4, "embed_dim": 384, "num_heads": 6}),
        (
            "vit_tiny",
            {"image_size": 8, "patch_size": 2, "dim": 64, "depth": 4, "heads": 4, "mlp_ratio": 2.0},
            {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
        ),
        ("convnext_atto", {"patch_size": 4}, {"patch_size": 4, "dims": (40, 80, 160, 320)}),
        ("convnext_atto", {"patch_size": 1, "width": 8}, {"patch_size": 1, "dims": (8, 16, 32, 64)}),
    ],
)
def test_the_networks_are_those_of_timm(name: str, options: dict[str, Any], theirs: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    ours = randomise(build_model(name, **options))
    if name.startswith("vit"):
        other = timm.models.VisionTransformer(num_classes=10, **theirs)
    else:
        other = timm.models.ConvNeXt(num_classes=10, depths=(2, 2, 6, 2), conv_mlp=True, **theirs)
    other.double().eval().load_state_dict(ours.state_dict())
    size = options.get("image_size", 32)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    expected = other(images)
    assert expected.std() > 0.1
    assert (ours(images) - expected).abs().max() < 1e-10


def test_stochastic_depth_rises_as_in_timm() -> None:
    timm = pytest.importorskip("timm")
    for name, other in (
        ("vit_tiny", timm.models.VisionTransformer(32, 4, embed_dim=16, num_heads=1, drop_path_rate=0.3)),
        ("convnext_atto", timm.models.convnext_atto(drop_path_rate=0.3)),
    ):
        rates = [module.dropout.p for module in build_model(name, drop_path=0.3).modules() if type(module) is DropPath]
        drops = (module for path, module in other.named_modules() if path.endswith(("drop_path", "drop_path1")))
        theirs = [module.drop_prob for module in drops if type(module) is not nn.Identity]
        # The first block drops nothing: neither has a module for it.
        assert rates == pytest.approx(theirs)


@pytest.mark.parametrize("name", SMALL)
def test_training_and_evaluation_run_the_same_operations(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, drop_path=0.5, **SMALL[name])
    assert have_same_calls(trace(model), trace(model, training=True))


@pytest.mark.parametrize("shape", [(400, 3, 5), (400, 3, 4, 4)])
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(shape: tuple[int, ...]) -> None:
    drop, x = DropPath(0.25), torch.ones(shape)
    with seeded(0):
        kept = drop(x)
    each = kept.flatten(1)
    assert torch.equal(each.amin(1), each.amax(1))
    assert each.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (each[:, 0] == 0).double().mean().item() == pytest.approx(0.25, abs=0.06)
    with seeded(0):
        assert torch.equal(kept, drop(x)), "the global generator decides, as for dropout"
    assert torch.equal(drop.eval()(x), x)


def test_no_stochastic_depth_draws_nothing() -> None:
    assert all(type(drop) is nn.Identity for drop in drop_paths(0.0, 3))
    assert type(drop_paths(0.5, 1)[0]) is nn.Identity


@pytest.mark.parametrize(("name", "theirs"), [("vit_tiny", "vit_tiny_patch16_224"), ("convnext_atto", "convnext_atto")])
def test_the_initialisation_is_that_of_timm(name: str, theirs: str) -> None:
    timm = pytest.importorskip("timm")
    ours = build_model(name)
    with seeded(0):
        initialiser("timm_vit" if name == "vit_tiny" else "timm_convnext")(ours)
        expected = dict(getattr(timm.models, theirs)(num_classes=10).named_parameters())
    for key, parameter in ours.named_parameters():
        if parameter.numel() > 1000 or key == "cls_token":
            deviation = expected[key].std().item()
            # Patches have another size here, and torch draws a convolution by its inputs.
            deviation *= 4 if key == "patch_embed.proj.weight" else 1
            assert parameter.std().item() == pytest.approx(deviation, rel=0.15), key
        elif expected[key].unique().numel() == 1:
            assert torch.equal(parameter, expected[key]), key


@pytest.mark.parametrize("name", SMALL)
def test_a_narrower_network_is_drawn_anew_in_every_parameter(name: str) -> None:
    """Also the class token, the position embedding and the scales, which are no layer's weights."""
    model = build_model(name, **SMALL[name])
    narrow = prune(model, "l1", example=torch.zeros(1, *IMAGES), ratio=0.5).model if name != "vit_tiny" else model
    if name == "vit_tiny":  # half of the hidden units, as a pruner of linear layers leaves them
        for block in narrow.blocks:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
    draw = initialiser(type(model).initialiser)
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.fill_(7)
    with seeded(1):
        draw(narrow)
    assert all((parameter != 7).all() for parameter in narrow.parameters())
    for path, layer in narrow.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and name == "convnext_atto"):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25), path
            assert layer.bias is not None
            assert not layer.bias.any()
    if name == "vit_tiny":
        assert narrow.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
        assert 0 < narrow.cls_token.abs().max() < 1e-5
        assert narrow.patch_embed.proj.weight.abs().max() <= 1 / 48**0.5, "a convolution as torch draws it"
    else:
        assert all((block.gamma == 1e-6).all() for block in narrow.stages.modules() if hasattr(block, "gamma"))


def test_a_vit_with_fewer_heads_runs_the_same_code() -> None:
    """Without its second head, the logits are those with the second head's part of the projection at zero."""
    model = randomise(build_model("vit_tiny", **SMALL["vit_tiny"]))
    images = torch.randn(2, *IMAGES, dtype=torch.float64)
    rest = torch.tensor([*range(8), *range(16, 32)])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight[:, 8:16] = 0
        expected = model(images)
        for block in model.blocks:
            attention = block.attn
            rows = torch.cat([rest, 32 + rest, 64 + rest])
            attention.qkv.weight = nn.Parameter(attention.qkv.weight[rows])
            attention.qkv.bias = nn.Parameter(attention.qkv.bias[rows])
            attention.proj.weight = nn.Parameter(attention.proj.weight[:, rest])
    assert (model(images) - expected).abs().max() < 1e-12


def test_images_of_another_size_do_not_run() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        build_model("vit_tiny", **SMALL["vit_tiny"])(torch.zeros(1, 3, 8, 8))


def test_a_missing_timm_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if "site-packages" not in part])
    with pytest.raises(UserError) as error:
        build_model("timm.models:deit_small_patch16_224")
    assert str(error.value) == (
        'model.name=timm.models:deit_small_patch16_224: needs timm; install it with pip install "rethink-prune[timm]"'
    )
