"""What a slip of the keyboard is answered with: one line, and the names that are nearest."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from rethink_prune.errors import UserError
from rethink_prune.files import conf_dir
from rethink_prune.study.compose_errors import check_hydra_keys, composition_error


def answer(*overrides: str) -> str:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        try:
            check_hydra_keys(compose("config", list(overrides), return_hydra_config=True).hydra)
        except (HydraException, UserError) as error:
            return str(composition_error(error, overrides))
    return "composed"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pruner.ratoi=0.3", "pruner.ratoi: unknown key; did you mean ratio?"),
        ("~pruner.nmae", "pruner.nmae: unknown key; did you mean name?"),
        ("modle=vgg16", "modle: unknown key; did you mean model?"),
        ("experimnt=l1_vgg16_cifar10", "experimnt: unknown key; did you mean experiment?"),
        ("recipe.finetune.epoch=3", "recipe.finetune.epoch: unknown key; did you mean epochs?"),
        ("recipe.fintune.epochs=3", "recipe.fintune: unknown key; did you mean finetune?"),
        ("experiment=l1_vgg16_cifar11", "experiment=l1_vgg16_cifar11: no such choice; did you mean l1_vgg16_cifar10,"),
        ("budget=papr", "budget=papr: no such choice; did you mean paper?"),
        ("budget=mine", "budget=mine: no such choice; known are capped, paper, plus_finetune"),
        ("+budget=paper", "+budget=paper: leave out the sign before budget: budget=paper"),
        ("+pruner.ratio=0.3", "+pruner.ratio=0.3: leave out the sign before pruner.ratio: pruner.ratio=0.3"),
        ("model.args.width=64", "model.args.width=64: is in no file yet, and needs a sign: +model.args.width=64"),
        ("dataset.path=photos", "dataset.path: is a key of dataset=huggingface alone"),
        ("model.conv_bias=true", "model.conv_bias: is a key of model=vgg11, vgg13, vgg16, vgg19, vgg5 alone"),
        ("pruner.positions_per_image=5", "pruner.positions_per_image: is a key of pruner=regression alone"),
        ("hydra.job.chdri=true", "hydra.job.chdri: unknown key; did you mean chdir?"),
        ("+hydra.job.chdri=true", "hydra.job.chdri: unknown key; did you mean chdir?"),
        ("pruner.ratio=[0.3", "pruner.ratio=[0.3: cannot be read: no viable alternative at input '[0.3'"),
        ("pruner", "pruner: cannot be read: missing EQUAL at '<EOF>'; it must have the form key=value"),
        ("seed=1,2", "seed=1,2: several values: add -m to run each, or write a list: seed=[1,2]"),
        ("+hydra.job.env_set.MINE=1", "composed"),
        ("++pruner.ratio=0.3", "composed"),
    ],
)
def test_a_slip_is_named_with_what_was_meant(override: str, expected: str) -> None:
    found = answer(override)
    assert found.startswith(expected)
    assert "\n" not in found


def test_every_shipped_choice_composes_without_unknown_keys_of_hydra() -> None:
    assert answer("launcher=local") == answer("launcher=slurm") == answer("launcher=ray") == "composed"
