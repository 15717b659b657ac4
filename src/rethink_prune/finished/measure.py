"""Measure what a pruned network and its unpruned one take on a device: parameters, MACs, time and memory.

`measure_stage` gives the content of ``cost.json``, `cost_table` shows it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from rethink_prune.cost import count_cost, pass_memory, time_passes
from rethink_prune.finished.load import Factory, build_unpruned, image_shape, read_config
from rethink_prune.store.stage import Stage
from rethink_prune.store.weights import weights_bytes
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.cut import reshape
from rethink_prune.text import markdown, size
from rethink_prune.training.runtime import describe_device

BATCH_SIZES = (1, 128)


def measure_stage(
    stage: Stage, device: torch.device, precision: str, *, rounds: int, factory: Factory | None = None
) -> dict[str, Any]:
    """Measure the network of a finished stage against the unpruned one.

    Weights are arbitrary, for neither time nor memory depends on them, but for masked ones, which are zero.

    Parameters
    ----------
    stage : Stage
        Any stage; of one with an unpruned network, that alone is measured.
    device : torch.device
    precision : {"fp32", "bf16"}
        The type of all weights and images.
    rounds : int
        How often each network is timed at each batch size; they take turns.
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Returns
    -------
    dict
        What ``cost.json`` holds: ``networks`` has ``large`` and ``pruned``, each with ``params``, ``macs``,
        ``weights_bytes`` (float32, as a safetensors file) and, by batch size, ``seconds`` of a pass,
        ``images_per_second`` and ``peak_memory_bytes``; ``speedup`` has, by batch size, the seconds of large over those
        of pruned. What was timed comes as median, least and greatest of the rounds.

    Raises
    ------
    UserError
        If the stage is not finished and intact, or needs a factory.
    """
    stage.finished()
    architecture, shape = Architecture.load(stage.folder), image_shape(stage)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    models = {"large": build_unpruned(stage, factory)}
    if any(vars(architecture).values()):
        models["pruned"] = reshape(models["large"], architecture)
        apply_masks(models["pruned"], architecture.masks)
    networks: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        cost = count_cost(model, shape, masks=architecture.masks if name == "pruned" else None)
        # Before the conversion to `dtype`: weights are stored in float32.
        stored = len(weights_bytes(model.state_dict()))
        networks[name] = {"params": cost.params, "macs": cost.macs, "weights_bytes": stored, "batches": {}}
        models[name] = model.to(device, dtype).to(memory_format=torch.channels_last).eval()
    speedup = {}
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, *shape).to(device, dtype, memory_format=torch.channels_last)
        times = time_passes(models, images, rounds=rounds)
        for name, model in models.items():
            networks[name]["batches"][str(batch_size)] = {
                "seconds": _spread(times[name]),
                "images_per_second": _spread(batch_size / seconds for seconds in times[name]),
                "peak_memory_bytes": pass_memory(model, images),
            }
        if "pruned" in times:
            # Round by round: the networks take turns, so a slow moment of the machine slows both.
            pairs = zip(times["large"], times["pruned"], strict=True)
            speedup[str(batch_size)] = _spread(large / pruned for large, pruned in pairs)
    return {
        "format": "rethink-prune cost 1",
        "stage": stage.name,
        "network": read_config(stage)["network"]["name"],
        "image_shape": list(shape),
        "masked": bool(architecture.masks),
        "device": describe_device(device),
        "torch": torch.__version__,
        "precision": precision,
        "rounds": rounds,
        "networks": networks,
        "speedup": speedup,
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = sorted(values)
    return {"median": median(values), "least": values[0], "greatest": values[-1]}


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
