"""The page about the configuration: what it or a file's own comment says of every key and choice, and of no other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rethink_prune.files import conf_dir
from rethink_prune.models.initialisers import INITIALISERS
from rethink_prune.study.arms import ARMS

CONF = Path(conf_dir())
TEXT = (CONF / "README.md").read_text()
GROUPS = ("dataset", "model", "pruner", "recipe", "budget", "transfer", "launcher")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def tree(*overrides: str) -> dict[str, object]:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)  # type: ignore[return-value]


def keys(tree: Mapping[str, object], path: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def documented() -> set[str]:
    """Return the keys that a table explains: those in the first cell of its rows."""
    cells = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| ")]
    return {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}


def commented(group: str) -> set[str]:
    """Return the choices whose file opens with a comment, and the keys that have one beside them."""
    found = set()
    for path in (CONF / group).glob("*.yaml"):
        text = path.read_text()
        if text.startswith("# "):
            found.add(path.stem)
        if text.startswith("# @package _global_"):  # the group's keys are below its name
            assert text.splitlines()[1].startswith("# ")
            text = text.replace("\n  ", "\n")
        found |= {f"{group}.{key}" for key in re.findall(r"^(\w+):[^#\n]*  # ", text, flags=re.MULTILINE)}
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_a_group_is_listed_or_says_what_it_is(group: str) -> None:
    assert set(choices(group)) <= documented() | commented(group)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "launcher"])
def test_every_key_is_explained(group: str) -> None:
    found = {key for choice in choices(group) for key in keys(tree(f"{group}={choice}"))}
    assert found <= documented() | commented(group)


def test_every_key_of_a_launcher_is_named() -> None:
    for path in (CONF / "launcher").glob("*.yaml"):
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert isinstance(plain, dict)
        plain.pop("defaults")
        assert all(f"`{key}`" in TEXT for key in keys(plain)), path  # type: ignore[arg-type]


def test_no_key_is_explained_that_does_not_exist() -> None:
    known = {key for group in GROUPS[:-1] for choice in choices(group) for key in keys(tree(f"{group}={choice}"))}
    # The first has no value in any file, the others are Hydra's.
    known |= {"recipe.finetune.step", "hydra.run.dir", "hydra.sweep.dir"}
    assert {key for key in documented() if "." in key} <= known


def test_values_that_have_names_are_all_listed() -> None:
    (row,) = (line for line in TEXT.splitlines() if line.startswith("| `model.init`"))
    assert set(re.findall(r"`(\w+)`", row)) - {"large"} == {"null", *INITIALISERS}
    (row,) = (line for line in TEXT.splitlines() if line.startswith("| `arms`"))
    assert set(re.findall(r"`(\w+)`", row)) - {"arms"} <= set(ARMS), "it names arms there are"
