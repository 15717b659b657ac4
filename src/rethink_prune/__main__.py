"""``python -m rethink_prune``: compose the configuration, validate it, run the study."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rethink_prune.errors import Interrupted


def conf_dir() -> str:
    """Return the folder of the shipped configuration: in the wheel, or beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return str(shipped if shipped.is_dir() else package.parents[1] / "conf")


@hydra.main(config_path=conf_dir(), config_name="config", version_base="1.3")
def run(tree: DictConfig) -> None:
    """Run the study that a composed configuration describes."""
    # Imported here: Hydra's --help and its errors need no torch.
    from rethink_prune.study import check_config, run_study
    from rethink_prune.training.interrupts import Interrupts

    plain = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    config = check_config(plain)
    job = HydraConfig.get()
    with Interrupts() as interrupts:
        run_study(
            config,
            Path(job.runtime.output_dir),
            interrupts,
            experiment=job.runtime.choices.get("experiment"),
        )


def main() -> None:
    """Run from the command line; a signal that was honoured ends the process with 128 + its number."""
    try:
        run()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    main()
