"""The names of stages, kind and key, are pinned: whoever has a store keeps what is in it.

A key that changes makes every store train again. Whoever changes one on purpose changes the pins in the same commit and
says so there: ``PYTHONPATH=tests python tests/studies/test_stage_names.py`` writes them anew.

Some architectures follow from trained weights, whose last bits differ between processors, and with them the keys of
their arms. Of these stages only the kind is pinned, unless the weights come from a file of exact numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from harness import SMALL, configure
from rethink_prune import build_model
from rethink_prune.study.run import run_study
from rethink_prune.training.interrupts import Interrupts

PINS = Path(__file__).with_name("stage_names.json")
TINY = ("dataset.train_limit=80", "dataset.test_limit=40", "recipe.epochs=1", "recipe.milestones=[]")
ALL_ARMS = "arms=[finetune,scratch_e,scratch_b,large_longer]"

OWN_CODE = '''"""A network, a data set and a pruner of somebody's own; their keys hold the digest of this file."""
import numpy as np
import torch
from torch import nn

from rethink_prune.pruning import Pruner


def narrow(num_classes, in_channels=3, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )


def noise(root, count=40):
    def side(seed):
        images = np.arange(count * 8 * 8 * 3).reshape(count, 8, 8, 3) * (7 + seed) % 251
        return images.astype(np.uint8), np.arange(count) % 2

    return {"train": side(0), "test": side(1), "classes": ["even", "odd"]}


class LastChannels(Pruner):
    def scores(self, model, groups, *, data, generator):
        return {group.name: -torch.arange(group.size, dtype=torch.float64) for group in groups}
'''

# By name: what the study is told, and the titles whose names follow from trained weights.
STUDIES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "l1": ((ALL_ARMS,), ()),
    "l1, ranked globally": (("pruner.ranking=global", "large.checkpoint=exact.safetensors"), ()),
    "l1, scratch alone": (
        ("arms=[scratch_e,scratch_b]", "pruner.ratio=null", "pruner.target_macs=0.6", "budget=plus_finetune"),
        (),
    ),
    "random, coupled channels": (("pruner=random", "pruner.scope=all", ALL_ARMS, "seed=3"), ()),
    "thinet": (("pruner=thinet", "pruner.images=80", ALL_ARMS), ()),
    "regression": (
        ("pruner=regression", "pruner.images=80", "arms=[finetune,scratch_e]"),
        ("finetune", "scratch_e"),
    ),
    "slimming": (("pruner=slimming", ALL_ARMS), ("finetune", "scratch_e", "scratch_b", "large_longer")),
    "sss": (
        ("pruner=sss", "pruner.sparse.strength=10", "arms=[finetune,scratch_e]"),
        ("finetune", "scratch_e"),
    ),
    "magnitude": (("pruner=magnitude", "large.checkpoint=exact.safetensors", ALL_ARMS), ()),
    "soft_filter": (("pruner=soft_filter", ALL_ARMS), ()),
    "soft_filter, masks": (
        ("pruner=soft_filter", "pruner.scope=all", "arms=[finetune,scratch_e]"),
        ("finetune", "scratch_e"),
    ),
    "own code": (
        (
            "model.name=own_code:narrow",
            "+model.args.width=12",
            "dataset.name=own_code:noise",
            "+dataset.args.count=48",
            "dataset.image_size=null",
            "dataset.train_limit=null",
            "dataset.test_limit=null",
            "pruner.name=own_code:LastChannels",
            ALL_ARMS,
        ),
        (),
    ),
    "every option of a training": (
        (
            "model=densenet40",
            "model.init=cifar_resnet_half_gamma",
            "dataset.validation=0.1",
            "dataset.pad=1",
            "dataset.flip=true",
            "recipe.epochs=4",
            "recipe.milestones=[2,3]",
            "recipe.gamma=[0.5,0.1]",
            "recipe.warmup=1",
            "recipe.nesterov=true",
            "recipe.decay_norms=false",
            "recipe.label_smoothing=0.1",
            "recipe.finetune.schedule=cosine",
            "recipe.finetune.lr=0.02",
            "sync_batchnorm=false",
            "budget=capped",
            "pruner.widths={conv1: 20}",
            "pruner.ratio=null",
            "pruner.scope=all",
            ALL_ARMS,
        ),
        (),
    ),
    "lengths, a teacher, an automatic start": (
        (
            "arms=[finetune,retrain@2,scratch@3,scratch@total:1,finetune_kd,retrain_kd@2,scratch_kd@2]",
            "recipe.warmup=1",
            "recipe.epochs=4",
            "recipe.finetune.schedule=linear",
            "recipe.finetune.lr=auto",
            "recipe.distillation.weight=0.5",
        ),
        (),
    ),
    "adamw, steps": (
        (
            "recipe.optimizer=adamw",
            "recipe.epochs=3",
            "recipe.schedule=step",
            "+recipe.step=1",
            "recipe.milestones=[]",
            "recipe.augment=false",
            "recipe.batch_size=16",
            "budget.base_epochs=2",
            "budget.reference_model=resnet32",
            ALL_ARMS,
        ),
        (),
    ),
}


def write_exact_weights(path: Path) -> None:
    """Write weights of ResNet-20 that every processor computes alike: small multiples of a power of two."""
    model = build_model("resnet20")
    for number, module in enumerate(model.modules()):
        for parameter in module.parameters(recurse=False):
            values = (torch.arange(parameter.numel()) * (37 + 2 * number) + 11 * number) % 255 - 127
            scale = 1.0 if isinstance(module, nn.BatchNorm2d) else 2.0
            parameter.data = (values.view(parameter.shape) / 2.0**10 * scale).float()
    safetensors.torch.save_file(model.state_dict(), path)


def stage_names(study: str, folder: Path) -> dict[str, str]:
    """Run a study in `folder` and return the names of its stages by title; of some, their kind alone."""
    overrides, by_weights = STUDIES[study]
    (folder / "own_code.py").write_text(OWN_CODE)
    write_exact_weights(folder / "exact.safetensors")
    config = configure(*SMALL, *TINY, f"store.root={folder / 'store'}", *overrides)
    with Interrupts() as interrupts:
        run_study(config, folder / "run", interrupts)
    (record,) = (folder / "store/runs").glob("*.json")
    names = json.loads(record.read_text())["stages"]
    return {title: name.split("-")[0] if title in by_weights else name for title, name in names.items()}


@pytest.mark.parametrize("study", STUDIES)
def test_stages_keep_their_names(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    assert stage_names(study, tmp_path) == json.loads(PINS.read_text())["studies"][study]


def test_the_pins_are_whole() -> None:
    pins = json.loads(PINS.read_text())
    assert set(pins["studies"]) == set(STUDIES)
    assert pins["sha256"] == digest(pins["studies"])


def digest(studies: Mapping[str, Mapping[str, str]]) -> str:
    return hashlib.sha256(json.dumps(studies, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for name in STUDIES:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            sys.modules.pop("own_code", None)
            found[name] = stage_names(name, Path(place))
    PINS.write_text(json.dumps({"sha256": digest(found), "studies": found}, indent=1) + "\n")
