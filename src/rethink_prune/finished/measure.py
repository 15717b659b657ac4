"""Measure what a pruned network and its unpruned one take on a device: parameters, MACs, time and memory.

`measure_stage` gives the content of ``cost.json``, `cost_table` shows it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from rethink_prune.cost import Forward, count_cost, pass_memory, time_passes
from rethink_prune.errors import first_line
from rethink_prune.finished.load import Factory, build_unpruned, image_shape, read_config
from rethink_prune.store.stage import Stage
from rethink_prune.store.weights import weights_bytes
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.cut import reshape
from rethink_prune.text import markdown, size
from rethink_prune.training.recording import WARM_UP, CudaRecorder, warn_not_recorded
from rethink_prune.training.runtime import Speed, describe_device

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 128)
# A device is full where twice the images take nearly twice the time: images/s grow by less than this.
_GROWTH = 1.05
_ROUNDS_OF_SEARCH = 3


def measure_stage(
    stage: Stage, device: torch.device, precision: str, *, rounds: int, factory: Factory | None = None
) -> dict[str, Any]:
    """Measure the network of a finished stage against the unpruned one.

    Weights are arbitrary, for neither time nor memory depends on them, but for masked ones, which are zero.

    On CUDA, passes are recorded and replayed, or each would take as long as its kernels take to be launched. There,
    the batch that fills the device is measured as well.

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
        of pruned. What was timed comes as median, least and greatest of the rounds. ``full_batch`` is the batch size
        that fills the device (null on a CPU), ``recorded`` says whether passes were replayed.

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

    def images(batch_size: int) -> torch.Tensor:
        made = torch.randn(batch_size, *shape, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last)

    # Networks in use run for long, so that cuDNN's search pays.
    Speed(compiles=False, searches=True).apply()
    full = None
    recorder = usable_recorder(CudaRecorder(device), models, images(1)) if device.type == "cuda" else None
    batch_sizes = dict.fromkeys(BATCH_SIZES)
    if device.type == "cuda":
        full = full_batch(partial(_rates, models, images, recorder), BATCH_SIZES[-1])
        batch_sizes[full] = None
    for batch_size in batch_sizes:
        batch = images(batch_size)
        times = time_networks(models, batch, recorder, rounds=rounds)
        for name, model in models.items():
            networks[name]["batches"][str(batch_size)] = {
                "seconds": _spread(times[name]),
                "images_per_second": _spread(batch_size / seconds for seconds in times[name]),
                "peak_memory_bytes": pass_memory(model, batch),
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
        "recorded": recorder is not None,
        "full_batch": full,
        "networks": networks,
        "speedup": speedup,
    }


def usable_recorder(
    recorder: CudaRecorder, models: Mapping[str, nn.Module], images: torch.Tensor
) -> CudaRecorder | None:
    """Return the recorder, or None, with a warning, if it cannot record a pass of every network."""
    try:
        time_networks(models, images, recorder, rounds=1)
    except RuntimeError as error:
        warn_not_recorded("the passes", first_line(error))
        return None
    return recorder


@torch.inference_mode()
def time_networks(
    models: Mapping[str, nn.Module], images: torch.Tensor, recorder: CudaRecorder | None, *, rounds: int
) -> dict[str, list[float]]:
    """Time passes as :func:`~rethink_prune.cost.time_passes` does; with a recorder, replays of recorded ones."""
    if recorder is None:
        return time_passes(models, images, rounds=rounds)
    launches: dict[str, Forward] = {}
    for name, model in models.items():
        for _ in range(WARM_UP):
            recorder.warm_up(partial(model, images))
        launch, _ = recorder.record(partial(model, images))
        launches[name] = partial(_replay, launch)
    return time_passes(launches, images, rounds=rounds)


def _replay(launch: Callable[[], None], images: torch.Tensor) -> None:
    # The images are those that were recorded, so there is nothing to copy.
    launch()


def full_batch(rates: Callable[[int], Sequence[float]], batch_size: int) -> int:
    """Return the batch size, doubled from a first one, from which on no network gets faster, or memory ends.

    Parameters
    ----------
    rates : callable
        Gives the images/s of every network at a batch size.

    Examples
    --------
    >>> full_batch(lambda size: [min(size, 1000.0), min(2.0 * size, 1000.0)], 128)
    1024
    """
    best = rates(batch_size)
    while True:
        try:
            found = rates(2 * batch_size)
        except RuntimeError as error:  # torch.OutOfMemoryError, or what it becomes in a recording
            log.info("batch %d: %s", 2 * batch_size, first_line(error))
            return batch_size
        if all(new <= _GROWTH * old for new, old in zip(found, best, strict=True)):
            return batch_size
        batch_size, best = 2 * batch_size, found


def _rates(
    models: Mapping[str, nn.Module],
    images: Callable[[int], torch.Tensor],
    recorder: CudaRecorder | None,
    batch_size: int,
) -> list[float]:
    times = time_networks(models, images(batch_size), recorder, rounds=_ROUNDS_OF_SEARCH)
    return [batch_size / median(seconds) for seconds in times.values()]


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
    # An earlier version's file has neither entry.
    if content.get("recorded"):
        notes.append("Passes are recorded as CUDA graphs and replayed.")
    if full := content.get("full_batch"):
        more = f"no more than {100 * (_GROWTH - 1):.0f} % more images/s"
        notes.append(f"Batch {full} fills the device: twice the images give {more}, or do not fit.")
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
