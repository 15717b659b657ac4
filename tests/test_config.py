"""What the configuration refuses, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import configure
from rethink_prune.errors import UserError
from rethink_prune.files import conf_dir
from rethink_prune.study.arms import ARMS, arm_form

EXPERIMENTS = sorted(path.stem for path in (Path(conf_dir()) / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_names_its_own_command(name: str) -> None:
    text = (Path(conf_dir()) / "experiment" / f"{name}.yaml").read_text()
    configure(f"experiment={name}", *(["pruner.sources=[runs]"] if "sources: ???" in text else []))
    assert f"experiment={name}" in text


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (folder.name, path.stem)
        for folder in sorted(Path(conf_dir()).iterdir())
        if folder.is_dir() and folder.name not in ("experiment", "launcher")
        for path in sorted(folder.glob("*.yaml"))
    ],
)
def test_every_choice_of_every_group_composes(group: str, name: str) -> None:
    configure(f"{group}={name}", *(["pruner.sources=[runs]"] if name == "guided" else []))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner.ratio=1.2"], "pruner.ratio=1.2: must be in (0, 1)"),
        (["pruner.ratio=-0.1"], "pruner.ratio=-0.1: must be in (0, 1)"),
        (["pruner.ratio=abc"], "pruner.ratio=abc: must be in (0, 1)"),
        (["pruner.ratio=[0.5,2]"], "found 2"),
        (
            ["pruner.variant=A"],
            "ratio and variant are both targets: give exactly one; for variant, add pruner.ratio=null",
        ),
        (["pruner.ratio=null"], "no target: give exactly one of ratio, variant, widths"),
        (["pruner.widths=3", "pruner.ratio=null"], "pruner.widths=3: must be a list"),
        (["pruner.scope=outer"], "pruner.scope=outer: must be inner or all"),
        (["pruner.name=l3"], "pruner.name=l3: no such pruner (your own: path.to.module:Class); known are l1"),
        (["arms=[]"], "arms=[]: no arm to run"),
        (["arms=5"], "arms=5: must be a list"),
        (["arms=finetune"], "arms=finetune: must be a list"),
        (["recipe.milestones=null"], "recipe.milestones=null: must be a list"),
        (["recipe.milestones=[inf]"], "must be a finite number"),
        (["+model.args.num_classes=3"], "num_classes comes from the data set"),
        (["dataset.image_size=100000000"], "dataset.image_size=100000000: must be less than or equal to 4096"),
        (["arms=[foo]"], f"arms=[foo]: no arm foo; known are {', '.join(map(arm_form, ARMS))}"),
        (["arms=[finetune,finetune]"], "finetune is named twice"),
        (["recipe.epochs=0"], "recipe.epochs=0: must be greater than or equal to 1"),
        (["recipe.batch_size=0"], "recipe.batch_size=0: must be greater than or equal to 1"),
        (["recipe.lr=-1"], "recipe.lr=-1: must be greater than 0"),
        (["recipe.lr=nan"], "recipe.lr=nan: must be"),
        (["recipe.mixup=-0.1"], "recipe.mixup=-0.1: must be greater than or equal to 0"),
        (["recipe.cutmix=inf"], "recipe.cutmix=inf: must be a finite number"),
        (["recipe.rand_augment=31"], "recipe.rand_augment=31: must be less than or equal to 30"),
        (["recipe.milestones=[0.9,0.5]"], "must ascend"),
        (["recipe.milestones=[0.5,120]"], "must be either all epochs or all fractions"),
        (["recipe.milestones=[6,12,20]"], "recipe: milestones 12, 20: come after the 12 epochs"),
        (
            ["recipe.finetune.schedule=steps"],
            "recipe.finetune.schedule=steps: must be multistep, step, cosine, constant or linear",
        ),
        (
            ["recipe.finetune.schedule=step"],
            "recipe.finetune: schedule=step and step (epochs between two drops) go together",
        ),
        (
            ["recipe.gamma=[0.1,0.1,0.1]"],
            "recipe: a list of gamma needs schedule=multistep and as many milestones",
        ),
        (
            ["pruner.ranking=global", "pruner.ratio=[0.1,0.2]"],
            "pruner: ranking=global takes one ratio for all layers; for one per layer, pruner.ranking=layer",
        ),
        (
            ["pruner.ratio=null", "pruner.widths={layer1.*: 5}", "pruner.skip=[layer2.*]", "pruner.round_to=8"],
            "pruner: skip and round_to: of no use with widths, which gives every width itself",
        ),
        (["~pruner"], "pruner.name: missing"),
        (["budget.cap=0.5"], "budget.cap=0.5: must be greater than or equal to 1"),
        (["seed=-1"], "seed=-1: must be greater than or equal to 0"),
        (["device=gpu"], "device=gpu: must"),
        (["dataset.channels=2"], "dataset.channels=2: must be 1 or 3"),
        (["dataset.mean=[0.5,0.5]", "dataset.std=[1,1]"], "mean needs 3 value(s)"),
        (["+epochs=3"], "epochs: unknown key"),
        (["+recipe.epoch=3"], "recipe.epoch: unknown key; did you mean epochs?"),
        (["+pruner.ratios=0.3"], "pruner.ratios: unknown key; did you mean ratio?"),
        (["+dataset.foo=1"], "dataset.foo: unknown key; known are name, root"),
    ],
)
def test_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_errors_come_in_one_message() -> None:
    with pytest.raises(UserError) as error:
        configure("pruner.ratio=2", "recipe.epochs=0", "seed=-1", "arms=[foo]", "+bar=1")
    lines = str(error.value).splitlines()
    assert sorted(line.split("=")[0].split(":")[0] for line in lines) == [
        "arms",
        "bar",
        "pruner.ratio",
        "recipe.epochs",
        "seed",
    ]


@pytest.mark.parametrize(
    ("overrides", "strength"),
    [
        (["pruner=slimming"], 0.01),
        (["pruner=sss"], 0.15),
        (["pruner=slimming", "recipe=paper", "model=vgg16", "dataset=cifar10"], 1e-4),
        (["pruner=slimming", "recipe=paper", "model=resnet20"], 1e-5),
        (["pruner=slimming", "recipe=imagenet", "model=vgg16_bn_imagenet", "dataset=imagenet"], 1e-5),
        (["pruner=sss", "recipe=paper"], 0.01),
        (["pruner=sss", "pruner.sparse.strength=3"], 3.0),
        (["pruner=slimming", "recipe=paper", "recipe.strengths.slimming=0.5"], 0.5),
    ],
)
def test_a_penalty_has_the_recipes_strength_or_the_published_one(overrides: list[str], strength: float) -> None:
    pruner: Any = configure(*overrides).pruner
    assert pruner.sparse.strength == strength
