"""Shell completion, driven as bash does it: by the function that Hydra's script defines for the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
# What bash sets before it calls the function that `complete` names, and what it then shows.
DRIVER = """
eval "$(rethink-prune -sc install=bash)"
[[ "$(complete -p rethink-prune)" =~ -F\\ ([a-z_]+) ]] || exit 1
for COMP_LINE in "$@"; do
    read -r -a typed <<< "$COMP_LINE"
    COMP_POINT=${#COMP_LINE} COMP_CWORD=$((${#typed[@]} - 1)) COMPREPLY=()
    "${BASH_REMATCH[1]}"
    echo "${COMPREPLY[@]}"
done
"""


def complete(*lines: str) -> list[set[str]]:
    """Return what the tabulator key offers after each line."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", DRIVER, "bash", *lines], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_bash_completes_groups_choices_and_keys() -> None:
    groups, choices, keys, second, sweep = complete(
        "rethink-prune mod",
        "rethink-prune model=vgg1",
        "rethink-prune pruner.ra",
        "rethink-prune experiment=l1_vgg16_cifar10 dataset.t",
        "rethink-prune -m budget=",
    )
    assert groups == {"model=", "model."}
    assert {"model=vgg11", "model=vgg16"} <= choices
    assert keys == {"pruner.ranking=", "pruner.ratio="}
    assert second == {"dataset.test_limit=", "dataset.train_limit="}
    assert sweep == {"budget=capped", "budget=paper", "budget=plus_finetune"}
