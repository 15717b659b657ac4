"""The table of what large and pruned networks take on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rethink_prune.store.listing import size
from rethink_prune.text import markdown

COST_FILE = "cost.json"


def cost_table(content: Mapping[str, Any]) -> str:
    """Return what `measure_stage` gave as a Markdown table, and what its numbers mean."""
    networks = content["networks"]
    rows = [
        ["parameters", *(f"{entry['params']:,}" for entry in networks.values())],
        ["MACs", *(f"{entry['macs'] / 1e6:,.2f} M" for entry in networks.values())],
        ["weights file", *(size(entry["weights_bytes"]) for entry in networks.values())],
    ]
    names = ("params", "macs", "weights_bytes")
    ratios = [f"{networks['large'][name] / networks['pruned'][name]:.2f}x" for name in names if "pruned" in networks]
    for batch_size in next(iter(networks.values()))["batches"]:
        measured = [entry["batches"][batch_size] for entry in networks.values()]
        rows += [
            [f"batch {batch_size}: ms a pass", *(_show(entry["seconds"], scale=1e3) for entry in measured)],
            [f"batch {batch_size}: images/s", *(_show(entry["images_per_second"]) for entry in measured)],
            [f"batch {batch_size}: peak memory", *(size(entry["peak_memory_bytes"]) for entry in measured)],
        ]
        if "pruned" in networks:
            large, pruned = (entry["peak_memory_bytes"] for entry in measured)
            ratios += [_times(content["speedup"][batch_size]), "", f"{large / pruned:.2f}x"]
    if ratios:
        rows = [[*row, ratio] for row, ratio in zip(rows, ratios, strict=True)]
    columns = [content["network"], *networks, *(["large / pruned"] if ratios else [])]
    return "\n\n".join([markdown(columns, rows), *_notes(content)])


def _notes(content: Mapping[str, Any]) -> list[str]:
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


def _show(spread: Mapping[str, float], scale: float = 1.0) -> str:
    shown = {name: _digits(value * scale) for name, value in spread.items()}
    return f"{shown['median']} [{shown['least']}, {shown['greatest']}]"


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f}x [{spread['least']:.2f}, {spread['greatest']:.2f}]"


def _digits(value: float) -> str:
    """Return a number with three digits that count, never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
