"""Evaluate a finished network on the test images of any data set that fits it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethink_prune.config import DatasetConfig, StudyConfig
from rethink_prune.data import describe_dataset, eval_batches, load_dataset
from rethink_prune.detection.batches import TestPictures
from rethink_prune.detection.load import load_detection
from rethink_prune.detection.task import AP, average_precision
from rethink_prune.errors import UserError
from rethink_prune.finished.load import Factory, detector_of, load_model, read_config
from rethink_prune.store.stage import Stage
from rethink_prune.store.store import Store
from rethink_prune.study.compose import compose_shipped
from rethink_prune.study.prepare import check_config
from rethink_prune.training.evaluate import evaluate
from rethink_prune.training.runtime import Runtime, describe_device


def evaluate_stage(
    stage: Stage, overrides: Sequence[str], runtime: Runtime, factory: Factory | None = None
) -> dict[str, Any]:
    """Evaluate a stage's network on test images that are normalised as in its training.

    Parameters
    ----------
    stage : Stage
        Finished.
    overrides : sequence of str
        Which data set, as on the command line of a study: ``dataset=cifar10 dataset.root=...``. If they set
        ``dataset.mean`` and ``dataset.std``, images are normalised by those. For a detector,
        ``transfer=voc transfer.root=...``.
    runtime : Runtime
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Returns
    -------
    dict
        ``top1``, ``top5`` (with more than five classes) and ``loss`` (None if it is not finite), or of a detector
        ``map`` and ``ap`` by class; ``images``, how many; and on what.

    Raises
    ------
    UserError
        If the stage cannot be loaded, or the data set does not fit its network.
    """
    if detector_of(stage) is not None:
        return _evaluate_detector(stage, overrides, runtime, factory)
    model, config = load_model(stage.folder, factory), compose_dataset(overrides, "--evaluate")
    options = fit_images(config.dataset, stage)
    cache, size = Store(Path(config.store.root)).cache, config.recipe.eval_batch_size
    dataset = load_dataset(options, cache_dir=cache, progress=runtime.show_progress)
    batches = eval_batches(dataset, dataset.test, batch_size=size, device=runtime.device, workers=options.workers)
    result = evaluate(runtime.place(model), batches, runtime=runtime)
    return {
        "stage": stage.name,
        "network": read_config(stage)["network"]["name"],
        "dataset": dataset.name,
        "images": len(batches),
        "top1": result.top1,
        **({} if result.top5 is None else {"top5": result.top5}),
        # JSON has no infinity.
        "loss": result.loss if math.isfinite(result.loss) else None,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "device": describe_device(runtime.device),
        "precision": runtime.precision,
    }


def _evaluate_detector(
    stage: Stage, overrides: Sequence[str], runtime: Runtime, factory: Factory | None
) -> dict[str, Any]:
    spec = detector_of(stage)
    assert spec is not None
    options = _compose_part("transfer", "voc", overrides, "--evaluate").transfer
    if options is None:
        raise UserError(f"--evaluate {' '.join(overrides)}: name the pictures: transfer=voc, say")
    data = load_detection(options, Path("datasets"))
    if data.test.classes != spec.classes:
        has, finds = ", ".join(data.test.classes), ", ".join(spec.classes)
        raise UserError(f"{data.name}: has the classes {has}; the detector {stage.name} finds {finds}")
    pictures = TestPictures(data.test, options.batch_size, runtime.device)
    model = load_model(stage.folder, factory).to(runtime.device)
    found = average_precision(model, pictures, spec.classes, runtime=runtime)
    return {
        "stage": stage.name,
        "network": read_config(stage)["network"]["name"],
        "dataset": data.name,
        "images": len(data.test),
        "map": found["map"],
        "ap": {name.removeprefix(AP): value for name, value in found.items() if name.startswith(AP)},
        "device": describe_device(runtime.device),
        "precision": runtime.precision,
    }


def fit_images(options: DatasetConfig, stage: Stage) -> DatasetConfig:
    """Return the options of a data set with images normalised as in a stage's training, unless they say how.

    Parameters
    ----------
    options : DatasetConfig
    stage : Stage
        Finished.

    Raises
    ------
    UserError
        If the stage's network takes other images; no image is read to find out.
    """
    info, trained = describe_dataset(options), read_config(stage)
    network = trained["network"]
    expected = {
        "classes": (info.num_classes, network["num_classes"]),
        "channels (dataset.channels)": (info.channels, network["in_channels"]),
        "pixels a side (dataset.image_size)": (info.image_size, network["image_size"]),
    }
    problems = [f"{has} {what}, not {needs}" for what, (has, needs) in expected.items() if has != needs]
    if problems:
        raise UserError(f"{info.name}: does not fit {stage.name}: it has {' and '.join(problems)}")
    if options.mean is None and "images" in trained:
        # By name: nothing else that a stage says may choose what is loaded.
        return options.with_statistics(trained["images"]["mean"], trained["images"]["std"])
    return options


def compose_dataset(overrides: Sequence[str], option: str) -> StudyConfig:
    """Compose the shipped configuration with overrides of its data set.

    Parameters
    ----------
    overrides : sequence of str
        As on the command line of a study.
    option : str
        What they were given to, for messages.

    Raises
    ------
    UserError
        If they choose no data set, say more than that, or make no sense.

    Examples
    --------
    >>> compose_dataset(["dataset=digits", "dataset.image_size=8"], "--evaluate").dataset.image_size
    8
    """
    return _compose_part("dataset", "cifar10", overrides, option)


def _compose_part(part: str, example: str, overrides: Sequence[str], option: str) -> StudyConfig:
    """Compose the shipped configuration with overrides of one part; as `compose_dataset`."""
    what = "pictures" if part == "transfer" else "data set"
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if key.partition(".")[0] != part:
            raise UserError(f"{option} {override}: only the {what} can be set: {part}=..., {part}.root=...")
    if not {part, f"{part}.name"} & set(keys):
        raise UserError(f"{option}: name the {what} first: {part}={example}, say")
    try:
        plain, _ = compose_shipped(overrides)
    except UserError as error:
        raise UserError(f"{option} {error}") from None
    return check_config(plain)


def evaluation_text(content: Mapping[str, Any]) -> str:
    """Return what `evaluate_stage` found, as a sentence."""
    if "map" in content:
        return (
            f"{content['network']} ({content['stage']}) on the {content['images']:,} test pictures of "
            f"{content['dataset']}: {content['map']:.2f} mAP ({content['device']}, {content['precision']})"
        )
    top5 = f", top-5 {content['top5']:.2f} %" if "top5" in content else ""
    loss = "not finite" if content["loss"] is None else f"{content['loss']:.4f}"
    return (
        f"{content['network']} ({content['stage']}) on the {content['images']:,} test images of {content['dataset']}: "
        f"top-1 {content['top1']:.2f} %{top5}, loss {loss} ({content['device']}, {content['precision']})"
    )
