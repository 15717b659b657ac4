"""The comparison with other tools: FastNAS as a pruner here, and the table of its page."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from rethink_prune import count_cost
from rethink_prune.config import parse_pruner
from rethink_prune.models.vgg import VGG

FOLDER = Path(__file__).parents[1] / "experiments/neighbours"


def test_fastnas_prunes_to_the_macs_with_weights_that_it_inherits() -> None:
    pytest.importorskip("modelopt", reason='pip install "rethink-prune[neighbours]"')
    found = runpy.run_path(str(FOLDER / "fastnas.py"))["FastNAS"]
    torch.manual_seed(0)
    model = VGG((8, "M", 12, 16), head="linear")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"name": "fastnas", "target_macs": 0.6, "ranking": "global", "images": 100}
    pruner = found(parse_pruner(options, found.options_type))
    target = pruner.target(model, torch.zeros(1, 3, 8, 8))
    images = [(torch.randn(50, 3, 8, 8), torch.randint(10, (50,)))] * 2
    result = pruner.prune(model, target, data=images, generator=torch.Generator())
    assert 0 < count_cost(result.model, (3, 8, 8)).macs <= 0.6 * target.full_cost.macs
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the network itself stays as it is"
    kept = set(result.model.get_parameter("features.1.weight").tolist())
    assert kept < set(model.get_parameter("features.1.weight").tolist())


def test_the_page_shows_the_differences_of_its_runs() -> None:
    table = runpy.run_path(str(FOLDER / "compare.py"))["table"](FOLDER / "results.json")
    assert table in (FOLDER / "README.md").read_text()
