"""The table of what large and pruned networks take on a device, from the content of ``cost.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rethink_prune.text import markdown, size

COST_FILE = "cost.json"


def cost_table(content: Mapping[str, Any]) -> str:
    """Return what `measure_stage` gave as a Markdown table, and what its numbers mean."""
    networks = content["networks"]
    entries = list(networks.values())
    rows = [
        _ratio_row("parameters", "{:,}".format, [entry["params"] for entry in entries]),
        _ratio_row("MACs", lambda macs: f"{macs / 1e6:,.2f} M", [entry["macs"] for entry in entries]),
        _ratio_row("weights file", size, [entry["weights_bytes"] for entry in entries]),
    ]
    for batch_size in entries[0]["batches"]:
        measured = [entry["batches"][batch_size] for entry in entries]
        speedup = content["speedup"].get(batch_size)
        times = [_format_spread(entry["seconds"], lambda value: _three_digits(value * 1e3)) for entry in measured]
        rates = [_format_spread(entry["images_per_second"], _three_digits) for entry in measured]
        ratio = _format_spread(speedup, "{:.2f}".format, unit="x") if speedup else ""
        rows += [
            [f"batch {batch_size}: ms a pass", *times, ratio],
            [f"batch {batch_size}: images/s", *rates, ""],
            _ratio_row(f"batch {batch_size}: peak memory", size, [entry["peak_memory_bytes"] for entry in measured]),
        ]
    columns = [content["network"], *networks, "large / pruned"]
    if "pruned" not in networks:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return "\n\n".join([markdown(columns, rows), *_cost_notes(content)])


def _cost_notes(content: Mapping[str, Any]) -> list[str]:
    image = " x ".join(map(str, content["image_shape"]))
    notes = [
        f"{content['device']}, torch {content['torch']}, weights and images in {content['precision']}, channels last, "
        f"images of {image}. Median [least, greatest] of n = {content['rounds']} rounds, in which the networks take "
        "turns.",
        "A pass is timed from its call until its logits are there, on images that are on the device already, without "
        "torch.compile. Peak memory counts weights, images and intermediate results; on CUDA also the kernels' work "
        "space. The weights file is float32.",
    ]
    if content["masked"]:
        notes.append(
            "Single weights are masked: parameters and MACs count the others. Zeros do not make dense kernels faster, "
            "nor tensors smaller: time, memory and file are those of the unpruned network, and only sparse kernels or "
            "storage would gain."
        )
    return notes


def _format_spread(spread: Mapping[str, float], show: Callable[[float], str], unit: str = "") -> str:
    return f"{show(spread['median'])}{unit} [{show(spread['least'])}, {show(spread['greatest'])}]"


def _three_digits(value: float) -> str:
    """Return a number with three significant digits, never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio_row(title: str, show: Callable[[int], str], values: Sequence[int]) -> list[str]:
    return [title, *map(show, values), f"{values[0] / values[-1]:.2f}x"]
