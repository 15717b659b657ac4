"""A data set is one module in ``data/sources`` and one file in ``conf/dataset``; nothing else names it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from rethink_prune.config import HUB_OPTIONS, DatasetConfig
from rethink_prune.data import describe_dataset, eval_batches, load_dataset, sources, train_batches
from rethink_prune.data.sources import built_in_sources
from rethink_prune.errors import UserError

CONFIGS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (Path(__file__).parents[2] / "conf/dataset").glob("*.yaml")
}

# What a contributor writes: images whose stripes lie or stand.
STRIPES = """
from functools import partial

import torch

from rethink_prune.data.source import Contents, DataSource, ImageArray

RANK = 15


def stripes_source(options):
    size = options.image_size or 8
    return DataSource(size, options.channels, (10, 10), (5, 5), load=partial(load_stripes, size, options.channels))


def load_stripes(size, channels):
    lying = (torch.arange(size) % 2 * 255).to(torch.uint8).view(size, 1, 1).expand(size, size, channels)
    images = torch.stack([lying, lying.transpose(0, 1)] * 10)
    labels = torch.tensor([0, 1] * 10)
    return Contents(("lying", "standing"), ImageArray(images, labels), ImageArray(images[:10], labels[:10]))


SOURCES = {"stripes": stripes_source}
"""


def names_in_error() -> list[str]:
    with pytest.raises(UserError) as error:
        describe_dataset(DatasetConfig(name="mnist"))
    message = str(error.value)
    start = "dataset.name=mnist: no such data set (your own: path.to.module:factory); known are "
    assert message.startswith(start)
    return message.removeprefix(start).split(", ")


def test_an_unknown_name_is_answered_with_all_names_in_order() -> None:
    shipped = ["digits", "cifar10", "cifar100", "imagenet", "folder", "huggingface"]
    assert [name for name in names_in_error() if name in shipped] == shipped
    assert names_in_error() == list(built_in_sources())


def test_every_data_set_has_a_config_and_every_config_a_data_set() -> None:
    assert set(CONFIGS) == set(built_in_sources())
    assert {"digits", "cifar10", "cifar100", "imagenet", "folder"} <= set(CONFIGS)


def test_configs_have_the_same_keys_and_describe_themselves() -> None:
    assert tuple(CONFIGS["huggingface"]) == tuple(DatasetConfig.model_fields)
    common = tuple(name for name in DatasetConfig.model_fields if name not in HUB_OPTIONS)
    assert {tuple(config) for name, config in CONFIGS.items() if name != "huggingface"} == {common}
    for name, config in CONFIGS.items():
        assert config["name"] == name
        options = DatasetConfig.model_validate(config)
        if name not in ("folder", "huggingface"):  # have no folder yet
            assert describe_dataset(options).image_size == config["image_size"]


def test_a_new_module_adds_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stripes.py").write_text(STRIPES)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{sources.__name__}.stripes", raising=False)
    order = names_in_error()
    assert order.index("digits") < order.index("stripes") < order.index("cifar10"), "ordered by rank"

    options = DatasetConfig(name="stripes", channels=1, validation=0.2, pad=1)
    info = describe_dataset(options)
    assert (info.train_images, info.validation_images, info.test_images, info.image_size) == (16, 4, 10, 8)
    dataset = load_dataset(options, cache_dir=tmp_path)
    assert dataset.classes == ("lying", "standing")
    assert dataset.mean == (0.5,)
    cpu = torch.device("cpu")
    shapes = [
        x.shape for x, _ in train_batches(dataset, options, batch_size=8, augment=True, device=cpu, seed=0).epoch(0)
    ]
    assert shapes == [(8, 1, 8, 8)] * 2
    labels = [y for _, y in eval_batches(dataset, dataset.test, batch_size=10, device=cpu)]
    assert labels[0].tolist() == [0, 1] * 5
    with pytest.raises(UserError, match=r"dataset\.train_limit=17: there are only 16 train images"):
        describe_dataset(options.model_copy(update={"train_limit": 17}))


def test_finding_data_sets_imports_nothing_slow() -> None:
    program = """
        import sys
        from rethink_prune.config import DatasetConfig
        from rethink_prune.data import describe_dataset
        for name in ("digits", "cifar10", "imagenet"):
            describe_dataset(DatasetConfig(name=name))
        print(sorted({"torchvision", "sklearn", "datasets"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
