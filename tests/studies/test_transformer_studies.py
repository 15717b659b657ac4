"""Studies of transformers and ConvNeXt: from the image size to the networks that finished stages hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import SMALL, configure, plan_of
from rethink_prune import load_model
from rethink_prune.errors import UserError

Study = Callable[..., dict[str, Any]]
VIT = ("model=vit_tiny", "model.dim=16", "model.depth=2", "model.heads=2", "model.drop_path=0.2")
CONVNEXT = ("model=convnext_atto", "model.width=4", "model.stages=2", "model.drop_path=0.2")
ADAMW = ("recipe.optimizer=adamw", "recipe.lr=0.001", "arms=[finetune,scratch_e]")


@pytest.mark.parametrize("options", [(*VIT, "pruner=magnitude"), (*CONVNEXT, "pruner=l1")], ids=["vit", "convnext"])
def test_a_study_draws_every_weight_anew_and_its_stages_load(options: tuple[str, ...], small_study: Study) -> None:
    summary = small_study(*options, *ADAMW)
    assert summary["pruned"]["macs"] < summary["large"]["macs"]
    assert not summary["study"]["warnings"]
    for arm in ("finetune", "scratch_e"):
        stage = Path(summary["arms"][arm]["stage"])
        model, kept = load_model(stage), load_file(stage / "model.safetensors")
        assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_a_vit_is_built_for_the_images_of_the_study() -> None:
    plan = plan_of(configure(*SMALL, *VIT, "pruner=magnitude"))
    larger = plan_of(configure(*SMALL, *VIT, "pruner=magnitude", "dataset.image_size=16"))
    # Twelve tokens more, of 16 features each.
    assert larger["large"]["params"] - plan["large"]["params"] == 12 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*VIT, "model.patch_size=3"), r"^model\.patch_size=3: must divide the size of the images, 8$"),
        ((*VIT, "+model.image_size=16"), r"^model: image_size comes from the data set: dataset\.image_size$"),
        (
            ("model=convnext_atto", "model.patch_size=4"),
            r"^model\.name=convnext_atto: fails on images of 3 x 8 x 8 \(dataset\.channels, dataset\.image_size\): ",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused_at_once(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(configure(*SMALL, *options))


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "convnext_tiny", "deit_small"])
def test_imagenet_networks_are_planned_by_name(name: str) -> None:
    if name == "deit_small":
        pytest.importorskip("timm")
    options = (f"model={name}_imagenet", "dataset=imagenet", "recipe=imagenet", "device=cpu")
    plan = plan_of(configure(*options, "pruner=magnitude", "arms=[finetune,scratch_e]"))
    published = {"vit_b_16": 86567656, "swin_t": 28288354, "convnext_tiny": 28589128, "deit_small": 22050664}
    assert plan["large"]["params"] == published[name]
