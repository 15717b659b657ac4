"""The paper's accuracies: the same as in the heads of the experiment files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rethink_prune.files import conf_dir
from rethink_prune.report import notes
from rethink_prune.report.notes import paper_row

TABLES = yaml.safe_load(Path(notes.__file__).with_name("paper.yaml").read_text())
WORDS = {
    "large": "unpruned",
    "finetune": "fine-tuned",
    "scratch_e": "Scratch-E",
    "scratch_b": "Scratch-B",
    "pruned": "pruned",
}


def experiment(name: str) -> tuple[str, dict[str, object]]:
    text = (Path(conf_dir()) / "experiment" / f"{name}.yaml").read_text()
    head = " ".join(" ".join(line.lstrip("#") for line in text.split("\ndefaults:")[0].splitlines()).split())
    return head, yaml.safe_load(text)["pruner"]


@pytest.mark.parametrize("name", TABLES)
def test_accuracies_are_those_of_the_experiment_files(name: str) -> None:
    head, pruner = experiment(name)
    table = TABLES[name]
    assert f"Table {table['table']};" in head
    assert ("5 runs" if table["runs"] == 5 else "one run") in head
    for row in table["rows"]:
        ((option, value),) = row["target"].items()
        assert pruner[option] == value or f"ratio {value}:" in head
        found = paper_row(name, {option: value})
        assert found is not None
        for arm, top1 in found.top1.items():
            spread = "" if top1.sd is None else f" ({top1.sd:.2f})"
            if table["table"] in (2, 3) and arm != "large":
                whole = float(found.note.split()[-1]) if arm == "finetune" and found.note else found.top1["large"].mean
                assert f"{WORDS[arm]} {top1.mean - whole:+.2f}" in head
            elif table["table"] in (2, 3):
                assert f"(of {top1.mean:.2f})" in head
            else:
                assert f"{WORDS[arm]} {top1.mean:.2f}{spread}" in head


def test_other_experiments_and_targets_have_none() -> None:
    assert paper_row("l1_resnet20_cifar10_cpu", {"ratio": 0.5}) is None
    assert paper_row(None, {"variant": "A"}) is None
    assert paper_row("slimming_vgg19_cifar10", {"ratio": 0.5}) is None
