"""``python -m rethink_prune.export STAGE``: take a network out of its store, test it elsewhere, or measure it."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rethink_prune.commands.network import add_network_arguments, check_device
from rethink_prune.errors import UserError
from rethink_prune.files import COST_FILE, SUMMARY_FILE, write_json
from rethink_prune.imports import import_object


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        factory = import_object(options.factory, "--factory") if options.factory else None
        if not options.stage.is_dir():
            raise UserError(f"{options.stage}: no such folder")
        if options.evaluate or options.cost:
            _test(options, factory)
        else:
            _export(options, factory)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    description = "Take the network of a finished stage out of its store; or test it on other images; or measure it."
    evaluate = "instead, evaluate it on the test images of a data set, given as for a study: dataset=cifar10 ..."
    cost = "instead, measure it against the unpruned network, while nothing else should run; for a run, also into its "
    parser = argparse.ArgumentParser(prog="rethink-prune-export", description=description)
    parser.add_argument("stage", type=Path, help="the stage's folder, STORE/stages/<kind>-<key>; for --cost also a run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where weights and architecture go (export/<stage>)")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="also write it as ONNX, checked with onnxruntime")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--evaluate", nargs="+", metavar="OVERRIDE", help=evaluate)
    instead.add_argument("--cost", action="store_true", help=f"{cost}{COST_FILE}")
    add_network_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of --cost (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what --evaluate or --cost found")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.rounds < 1:
        parser.error(f"argument --rounds: {options.rounds}: must be a whole number from 1")
    return options


def _export(options: argparse.Namespace, factory: Callable[..., Any] | None) -> None:
    # Imported here, and in the function below: --help and wrong arguments need no torch.
    from rethink_prune.finished import export, load

    if options.json is not None:
        raise UserError("--json: goes with --evaluate or --cost")
    stage = load.single_stage(options.stage)
    if options.onnx is not None:
        if load.detector_of(stage) is not None:
            raise UserError(f"--onnx: {stage.name} is a detector; only classifiers are written as ONNX")
        export.check_onnx_packages()
    folder = options.out or Path("export") / stage.name
    export.export_stage(stage, folder, factory)
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if options.onnx is not None:
        # Of the exported weights, whose masked ones are zero.
        difference = export.export_onnx(load.load_model(folder, factory), load.image_shape(stage), options.onnx)
        print(f"{options.onnx}: logits differ from torch's by {difference:.1e} of the greatest, on 8 random images")


def _test(options: argparse.Namespace, factory: Callable[..., Any] | None) -> None:
    """Evaluate or measure the network; print what was found, and write it to the files that shall have it."""
    from rethink_prune.finished import evaluate, load, measure
    from rethink_prune.training.runtime import prepare_runtime

    if options.out is not None or options.onnx is not None:
        raise UserError("--out and --onnx: do not go with --evaluate and --cost, which export nothing")
    runtime = replace(prepare_runtime(options.device, options.precision), show_progress=sys.stderr.isatty())
    is_run = options.cost and (options.stage / SUMMARY_FILE).is_file()
    stage = load.pruned_stage(options.stage) if is_run else load.single_stage(options.stage)
    if options.cost and load.detector_of(stage) is not None:
        raise UserError(f"--cost: {stage.name} is a detector; only classifiers are measured")
    if options.cost:
        device, precision = runtime.device, runtime.precision
        content = measure.measure_stage(stage, device, precision, rounds=options.rounds, factory=factory)
        print(measure.cost_table(content))
    else:
        content = evaluate.evaluate_stage(stage, options.evaluate, runtime, factory)
        print(evaluate.evaluation_text(content))
    if is_run:
        write_json(options.stage / COST_FILE, content)
    if options.json is not None:
        write_json(options.json, content)


if __name__ == "__main__":
    sys.exit(main())
