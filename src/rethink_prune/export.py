"""``python -m rethink_prune.export STAGE``: take a network out of its store, test it elsewhere, or measure it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE, write_json
from rethink_prune.finished.costs import COST_FILE, cost_table
from rethink_prune.imports import import_object
from rethink_prune.store.stages import Stage

if TYPE_CHECKING:
    from rethink_prune.finished.finished import Factory


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rethink-prune-export",
        description="Take the network of a finished stage out of its store; or test it on other images; or measure it.",
    )
    parser.add_argument("stage", type=Path, help="the stage's folder, STORE/stages/<kind>-<key>; for --cost also a run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where weights and architecture go (export/<stage>)")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="also write it as ONNX, checked with onnxruntime")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--evaluate",
        nargs="+",
        metavar="OVERRIDE",
        help="instead, evaluate it on the test images of a data set, given as for a study: dataset=cifar10 ...",
    )
    instead.add_argument(
        "--cost",
        action="store_true",
        help="instead, measure it against the unpruned network, while nothing else should run; "
        f"for a run, also into its {COST_FILE}",
    )
    parser.add_argument(
        "--factory", metavar="path.to.module:factory", help="what builds a network of your own, or torchvision's"
    )
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=_positive, default=9, metavar="N", help="of --cost (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what --evaluate or --cost found")
    return parser


def _run(options: argparse.Namespace) -> None:
    # Imported here: --help and wrong arguments need no torch.
    from rethink_prune.finished.finished import evaluate_stage, measure_stage, pruned_stage
    from rethink_prune.training.runtime import Runtime, prepare_device, resolve_device, resolve_precision

    factory = cast("Factory", import_object(options.factory, "--factory")) if options.factory else None
    place: Path = options.stage
    if not place.is_dir():
        raise UserError(f"{place}: no such folder")
    if options.evaluate is None and not options.cost:
        if options.json is not None:
            raise UserError("--json: goes with --evaluate or --cost")
        _export(_stage(place), options, factory)
        return
    if options.out is not None or options.onnx is not None:
        raise UserError("--out and --onnx: do not go with --evaluate and --cost, which export nothing")
    device = resolve_device(options.device)
    prepare_device(device, deterministic=False)
    precision = resolve_precision(options.precision, device)
    if options.evaluate is not None:
        runtime = Runtime(device, precision, show_progress=sys.stderr.isatty())
        content = evaluate_stage(_stage(place), options.evaluate, runtime, factory)
        print(_evaluation_text(content))
    else:
        is_run = (place / SUMMARY_FILE).is_file()
        stage = pruned_stage(place) if is_run else _stage(place)
        content = measure_stage(stage, device, precision, rounds=options.rounds, factory=factory)
        print(cost_table(content))
        if is_run:
            write_json(place / COST_FILE, content)
    if options.json is not None:
        write_json(options.json, content)


def _export(stage: Stage, options: argparse.Namespace, factory: Factory | None) -> None:
    from rethink_prune.finished.finished import export_onnx, export_stage
    from rethink_prune.finished.load import load_model, read_config

    folder = options.out or Path("export") / stage.name
    export_stage(stage, folder, factory)
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if options.onnx is not None:
        network = read_config(stage)["network"]
        shape = (network["in_channels"], network["image_size"], network["image_size"])
        difference = export_onnx(load_model(folder, factory), shape, options.onnx)
        print(f"{options.onnx}: logits differ from torch's by {difference:.1e} of the greatest, on 8 random images")


def _stage(folder: Path) -> Stage:
    """Return the stage in a folder; for a run, say which stages it has."""
    from rethink_prune.finished.finished import run_stages

    if (folder / SUMMARY_FILE).is_file():
        stages = ", ".join(str(stage.folder) for stage in run_stages(folder).values())
        raise UserError(f"{folder}: is a run; give one of its stages: {stages or 'there is none yet'}")
    return Stage(folder.resolve())  # its name is the folder's


def _evaluation_text(content: dict[str, Any]) -> str:
    top5 = f", top-5 {content['top5']:.2f} %" if "top5" in content else ""
    loss = "not finite" if content["loss"] is None else f"{content['loss']:.4f}"
    return (
        f"{content['network']} ({content['stage']}) on the {content['images']:,} test images of {content['dataset']}: "
        f"top-1 {content['top1']:.2f} %{top5}, loss {loss} "
        f"({content['device']}, {content['precision']})"
    )


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text}: must be auto, cpu, cuda or cuda:N")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
