"""Arguments of the commands that run a finished network: what builds it, on which device, in which precision."""

import argparse
import re


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--factory``, ``--device`` and ``--precision``."""
    factory = "what builds a network of your own, or torchvision's"
    parser.add_argument("--factory", metavar="path.to.module:factory", help=factory)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End the command with its usage if `device` is no device's name."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        parser.error(f"argument --device: {device}: must be auto, cpu, cuda or cuda:N")
