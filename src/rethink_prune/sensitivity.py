"""``python -m rethink_prune.sensitivity RUN_OR_STAGE``: what pruning each layer alone does to a finished network."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from rethink_prune.commands.network import add_network_arguments, check_device
from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically
from rethink_prune.imports import import_object
from rethink_prune.text import duration


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = _parse_scan(arguments)
    try:
        _scan_and_show(options, _read_ratios(options.ratios))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parse_scan(arguments: list[str] | None) -> argparse.Namespace:
    description = "Prune every layer alone by several ratios, and evaluate each network without retraining it."
    ratios = "shares to remove, between commas (%(default)s)"
    pruner = "a pruner's name, or path.to.module:Class (the run's; l1 for a stage)"
    dataset = "the images, given as for a study: dataset=cifar10 dataset.root=... (the run's)"
    parser = argparse.ArgumentParser(prog="rethink-prune-sensitivity", description=description)
    parser.add_argument("source", type=Path, metavar="RUN_OR_STAGE", help="a run's folder, or that of a stage large")
    parser.add_argument("--ratios", default="0.1,0.3,0.5,0.7,0.9", metavar="R,R,...", help=ratios)
    parser.add_argument("--pruner", metavar="NAME", help=pruner)
    parser.add_argument("--dataset", nargs="+", default=[], metavar="OVERRIDE", help=dataset)
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate on N test images (all)")
    parser.add_argument("--out", type=Path, default=Path("sensitivity"), metavar="FOLDER", help="(%(default)s)")
    add_network_arguments(parser)
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.limit is not None and options.limit < 1:
        parser.error(f"argument --limit: {options.limit}: must be a whole number from 1")
    return options


def _read_ratios(text: str) -> tuple[float, ...]:
    """Return the ratios, ascending and each once."""
    try:
        ratios = sorted({float(part) for part in text.split(",")})
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UserError(f"--ratios {text}: must be shares in (0, 1) between commas, such as 0.1,0.5,0.9")
    return tuple(ratios)


def _scan_and_show(options: argparse.Namespace, ratios: tuple[float, ...]) -> None:
    # Imported here: --help and wrong arguments need no torch.
    from rethink_prune.finished import scan_source, sensitivity
    from rethink_prune.report.sensitivity_plot import draw_sensitivity
    from rethink_prune.training.runtime import prepare_runtime

    factory = import_object(options.factory, "--factory") if options.factory else None
    source = scan_source.scan_source(
        options.source, pruner=options.pruner, dataset=options.dataset, limit=options.limit
    )
    sensitivity.check_scan_folder(options.out, source)
    runtime = replace(
        prepare_runtime(options.device, options.precision),
        # A network of one's own may take no channels-last images.
        contiguous=factory is not None and not options.factory.startswith("torchvision.models:"),
        show_progress=sys.stderr.isatty(),
    )
    start = time.monotonic()
    found = sensitivity.scan(source, ratios, runtime, factory)
    picture = draw_sensitivity(found)
    sensitivity.write_scan(found, options.out)
    write_atomically(options.out / f"{picture.name}.png", picture.png)
    write_atomically(options.out / f"{picture.name}.svg", picture.svg)
    print(sensitivity.sensitivity_text(found))
    print(f"\n{len(found.rows)} networks in {duration(time.monotonic() - start)}: {options.out / picture.name}.png")


if __name__ == "__main__":
    sys.exit(main())
