"""What can be done with the network of a finished stage: take it along, test it on other images, measure it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import safetensors.torch
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from rethink_prune.config import StudyConfig
from rethink_prune.cost import count_cost, pass_memory, time_passes
from rethink_prune.data import DatasetInfo, describe_dataset, eval_batches, load_dataset
from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE, conf_dir, write_atomically
from rethink_prune.finished.load import build_unpruned, load_model, read_config
from rethink_prune.store.stages import MODEL_FILE, Stage, save_weights
from rethink_prune.study.arms import ARMS
from rethink_prune.study.run import check_config
from rethink_prune.surgery.cut import Architecture, reshape
from rethink_prune.surgery.masks import apply_masks
from rethink_prune.training.precision import describe_device
from rethink_prune.training.train import Runtime, evaluate

Factory = Callable[..., nn.Module]

# Greatest difference of a logit from torch's that an ONNX file may have, relative to the greatest logit.
ONNX_TOLERANCE = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (1, 128)


def export_stage(stage: Stage, folder: Path, factory: Factory | None = None) -> None:
    """Copy what is needed to use a stage's network without the store, in the form of a finished stage.

    Parameters
    ----------
    stage : Stage
        Finished.
    folder : Path
        Gets ``model.safetensors`` (the state dict; masked weights are zero), ``architecture.json`` (and
        ``architecture.safetensors``, if it has masks or selections), ``config.yaml`` (the unpruned network, how images
        were normalised, how it was trained) and ``status.json`` (checksums and results).
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Raises
    ------
    UserError
        If the stage cannot be loaded, or something else is in `folder`.
    """
    result = stage.finished()
    model, architecture = load_model(stage.folder, factory), Architecture.load(stage.folder)
    apply_masks(model, architecture.masks)
    _make_folder(folder, stage.name)
    config_text = yaml.safe_dump({"stage": stage.name, **read_config(stage)}, sort_keys=False)
    write_atomically(folder / "config.yaml", config_text.encode())
    save_weights(folder / MODEL_FILE, model.state_dict())
    architecture.save(folder)
    Stage(folder).finish(result, files=(MODEL_FILE, "architecture.json"))


def export_onnx(model: nn.Module, image_shape: Sequence[int], path: Path) -> float:
    """Write a network as ONNX, for batches of any size, and compare it with torch on one of eight random images.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, in evaluation mode.
    image_shape : sequence of int
        Shape of one image, C x H x W.
    path : Path
        The file; its input is ``images`` (float32, N x C x H x W, normalised), its output ``logits`` (N x classes).

    Returns
    -------
    float
        The greatest difference of a logit, relative to the greatest logit; at most `ONNX_TOLERANCE`.

    Raises
    ------
    UserError
        If a package is missing, the network cannot be written as ONNX, or computes something else there. No file is
        written then.
    """
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'rethink-prune[onnx]'")
    import onnxruntime

    try:
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *image_shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
        )
        assert program is not None
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # exporter and runtime each have errors of their own, without a common class
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{type(model).__name__}: cannot be written as ONNX: {reason}") from error
    images = torch.randn(8, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"{path}: not written: as ONNX, logits differ by {difference:.1e} of the greatest, "
            f"more than {ONNX_TOLERANCE:.0e}"
        )
    write_atomically(path, content)
    return difference


def evaluate_stage(
    stage: Stage, overrides: Sequence[str], runtime: Runtime, factory: Factory | None = None
) -> dict[str, Any]:
    """Evaluate a stage's network on the test images of any data set that fits it.

    Images are normalised as in its training, unless ``dataset.mean`` and ``dataset.std`` are set.

    Parameters
    ----------
    stage : Stage
        Finished.
    overrides : sequence of str
        Which data set, as on the command line of a study: ``dataset=cifar10 dataset.root=...``.
    runtime : Runtime
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Returns
    -------
    dict
        ``top1``, ``top5`` (with more than five classes) and ``loss`` (None if it is not finite); ``images``, how many;
        and on what.

    Raises
    ------
    UserError
        If the stage cannot be loaded, or the data set does not fit its network.
    """
    model, config, trained = load_model(stage.folder, factory), compose_dataset(overrides), read_config(stage)
    options = config.dataset
    _check_fit(describe_dataset(options), trained["network"], stage)
    if options.mean is None and "images" in trained:
        # By name: nothing else that a stage says may choose what is loaded.
        options = options.with_statistics(trained["images"]["mean"], trained["images"]["std"])
    cache = Path(config.store.root).absolute() / "cache"
    dataset = load_dataset(options, cache_dir=cache, progress=runtime.show_progress)
    batches = eval_batches(
        dataset,
        dataset.test,
        batch_size=config.recipe.eval_batch_size,
        device=runtime.device,
        workers=config.dataset.workers,
    )
    result = evaluate(runtime.place(model), batches, runtime=runtime)
    return {
        "stage": stage.name,
        "network": trained["network"]["name"],
        "dataset": dataset.name,
        "images": len(batches),
        "top1": result.top1,
        **({} if result.top5 is None else {"top5": result.top5}),
        "loss": result.loss if math.isfinite(result.loss) else None,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "device": describe_device(runtime.device),
        "precision": runtime.precision,
    }


def compose_dataset(overrides: Sequence[str]) -> StudyConfig:
    """Compose the shipped configuration with overrides of its data set.

    Raises
    ------
    UserError
        If they choose no data set, say more than that, or make no sense.
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if key.partition(".")[0] != "dataset":
            raise UserError(f"--evaluate {override}: only the data set can be set: dataset=..., dataset.root=...")
    if not {"dataset", "dataset.name"} & set(keys):
        raise UserError("--evaluate: name the data set first: dataset=cifar10, say")
    try:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            tree = compose("config", overrides=list(overrides))
        plain = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"--evaluate {' '.join(overrides)}: {' '.join(str(error).split())}") from None
    return check_config(plain)


def run_stages(run_dir: Path) -> dict[str, Stage]:
    """Return the finished stages of a run by name: ``large``, ``sparse``, ``pruned`` and the arms.

    Raises
    ------
    UserError
        If its summary cannot be read.
    """
    path = run_dir / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text())
        bases = {name: summary[name] for name in ("large", "sparse", "pruned") if name in summary}
        entries = {**bases, **summary.get("arms", {})}
        return {name: Stage(Path(entry["stage"])) for name, entry in entries.items() if "stage" in entry}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged") from None


def pruned_stage(run_dir: Path) -> Stage:
    """Return a finished stage with the pruned network of a run.

    Raises
    ------
    UserError
        If there is none.
    """
    pruned = {"pruned", *(name for name, arm in ARMS.items() if arm.network == "pruned")}
    for name, stage in run_stages(run_dir).items():
        if name in pruned:
            return stage
    raise UserError(f"{run_dir}: has no finished stage with the pruned network")


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
    network, architecture = read_config(stage)["network"], Architecture.load(stage.folder)
    shape = (network["in_channels"], network["image_size"], network["image_size"])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    models = {"large": build_unpruned(stage, factory)}
    if any(vars(architecture).values()):
        models["pruned"] = reshape(models["large"], architecture)
        apply_masks(models["pruned"], architecture.masks)
    networks: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        cost = count_cost(model, shape, masks=architecture.masks if name == "pruned" else None)
        content = safetensors.torch.save({key: t.contiguous().clone() for key, t in model.state_dict().items()})
        networks[name] = {"params": cost.params, "macs": cost.macs, "weights_bytes": len(content), "batches": {}}
        models[name] = model.to(device, dtype).to(memory_format=torch.channels_last).eval()
    speedup = {}
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, *shape).to(device, dtype, memory_format=torch.channels_last)
        times = time_passes(models, images, rounds=rounds)
        for name, model in models.items():
            networks[name]["batches"][str(batch_size)] = {
                "seconds": _spread(times[name]),
                "images_per_second": _spread([batch_size / seconds for seconds in times[name]]),
                "peak_memory_bytes": pass_memory(model, images),
            }
        if "pruned" in times:
            pairs = zip(times["large"], times["pruned"], strict=True)
            speedup[str(batch_size)] = _spread([large / pruned for large, pruned in pairs])
    return {
        "format": "rethink-prune cost 1",
        "stage": stage.name,
        "network": network["name"],
        "image_shape": list(shape),
        "masked": bool(architecture.masks),
        "device": describe_device(device),
        "torch": torch.__version__,
        "precision": precision,
        "rounds": rounds,
        "networks": networks,
        "speedup": speedup,
    }


def _make_folder(folder: Path, name: str) -> None:
    """Make a folder for an export; only an earlier export of the same stage may be in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    if not present:
        return
    config = folder / "config.yaml"
    if not config.is_file() or not config.read_text().startswith(f"stage: {name}\n"):
        raise UserError(f"{folder}: holds something else already; name another folder with --out")


def _check_fit(info: DatasetInfo, network: Mapping[str, Any], stage: Stage) -> None:
    expected = {
        "classes": (info.num_classes, network["num_classes"]),
        "channels (dataset.channels)": (info.channels, network["in_channels"]),
        "pixels a side (dataset.image_size)": (info.image_size, network["image_size"]),
    }
    problems = [f"{has} {what}, not {needs}" for what, (has, needs) in expected.items() if has != needs]
    if problems:
        raise UserError(f"{info.name}: does not fit {stage.name}: it has {' and '.join(problems)}")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "greatest": max(values)}
