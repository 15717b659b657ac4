"""Guided pruning and its uniform baseline: against widths, patterns and averages worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rethink_prune import build_model, count_cost, prune
from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.pruner import Target
from rethink_prune.store.stage import MODEL_FILE, Stage
from rethink_prune.study.keys import architecture_key
from rethink_prune.surgery.architecture import Architecture

EXAMPLE = torch.zeros(1, 3, 32, 32)
# Convolutions of VGG-11 by the size of their output, and their widths.
STAGES = ((0,), (4,), (8, 11), (15, 18), (22, 25))
VGG11 = {0: 64, 4: 128, 8: 256, 11: 256, 15: 512, 18: 512, 22: 512, 25: 512}
# Of the same number of stages: 2, 2, 4, 4 and 4 layers.
VGG19_LAYERS = (2, 2, 4, 4, 4)
VGG11_NETWORK = {"name": "vgg11", "options": {}, "num_classes": 10, "in_channels": 3, "image_size": 32}


def target_of(pruner: str, network: str = "vgg11", *, seed: int = 0, **options: Any) -> Target:
    found = find_pruner(pruner)
    chosen = found(parse_pruner({"name": pruner, **options}, found.options_type))
    chosen.seed = seed
    return chosen.target(build_model(network), EXAMPLE, network)


def kept(target: Target) -> list[int]:
    return [layer.kept for layer in target.report().layers]


def layers_of(widths: Sequence[int]) -> list[dict[str, Any]]:
    pairs = zip(VGG11.items(), widths, strict=True)
    return [{"layer": f"features.{number}", "kept": width, "full": full} for (number, full), width in pairs]


def write_run(
    folder: Path, layers: list[dict[str, Any]], network: Mapping[str, Any] = VGG11_NETWORK, **pruned: Any
) -> str:
    """Write what a run leaves, as far as it is read."""
    folder.mkdir(parents=True)
    summary = {"study": {"settings": {"model": network}}, "pruned": {"layers": layers, **pruned}, "arms": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def write_stage(folder: Path, result: Mapping[str, Any], architecture: Architecture, **network: Any) -> str:
    """Write a finished stage."""
    stage = Stage(folder)
    with stage.hold():
        stage.begin({"network": {**VGG11_NETWORK, **network}, "title": "prune"}, None)
        save_file({"weight": torch.zeros(1)}, folder / MODEL_FILE)
        architecture.save(folder)
        stage.finish(result, files=(MODEL_FILE, "architecture.json"))
    return str(folder)


def write_masks(folder: Path, positions: Mapping[str, torch.Tensor]) -> str:
    """Write a prune stage in which each position of a layer's kernels is kept in a given share of them."""
    model, masks = build_model("vgg11"), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            kernels = module.weight.shape[:2].numel()
            share = positions[name].flatten()
            mask = torch.arange(kernels)[:, None] < (share * kernels).round()
            masks[f"{name}.weight"] = mask.view(module.weight.shape)
    layers = [
        {"layer": name.removesuffix(".weight"), "kept": int(mask.sum()), "full": mask.numel()}
        for name, mask in masks.items()
    ]
    return write_stage(folder, {"report": {"layers": layers}}, Architecture(masks=masks))


def each_layer(of_stages: Sequence[Any]) -> list[Any]:
    return [value for value, layers in zip(of_stages, STAGES, strict=True) for _ in layers]


@pytest.fixture
def halves(tmp_path: Path) -> str:
    """A run that keeps less and less of each layer stage; the two layers of a stage differ."""
    return write_run(tmp_path / "halves", layers_of([32, 32, 128, 64, 128, 64, 64, 192]))


# Shares 1/2, 1/4, (1/2 + 1/4) / 2, (1/4 + 1/8) / 2, (1/8 + 3/8) / 2.
SHARES = (0.5, 0.25, 0.375, 0.1875, 0.25)


# ---- widths --------------------------------------------------------------------------------------------------


def test_a_layer_stage_gets_the_average_share_of_its_layers(halves: str) -> None:
    target = target_of("guided", sources=[halves], size=1.0)
    assert target.known
    assert kept(target) == [32, 32, 96, 96, 96, 96, 128, 128]


def test_sources_count_alike(halves: str, tmp_path: Path) -> None:
    second = write_run(tmp_path / "second", layers_of([64, 128, 256, 256, 512, 512, 512, 256]))
    expected = [int((share + other) / 2 * 512) for share, other in zip(SHARES, (1, 1, 1, 1, 0.75), strict=True)]
    found = kept(target_of("guided", sources=[halves, second], size=1.0))
    assert found == [width * share // 512 for width, share in zip(VGG11.values(), each_layer(expected), strict=True)]


def test_a_folder_of_runs_holds_as_many_sources_and_each_counts_once(halves: str, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep/0", layers_of([32, 64, 128, 128, 256, 256, 256, 256]))
    write_run(tmp_path / "sweep/1", layers_of([16, 64, 128, 128, 256, 256, 256, 256]))
    sweep = str(tmp_path / "sweep")
    assert kept(target_of("guided", sources=[sweep], size=1.0))[0] == 24
    assert kept(target_of("guided", sources=[sweep, f"{sweep}/1"], size=1.0))[0] == 24


@pytest.mark.parametrize(("rounding", "width"), [("floor", 6), ("nearest", 7)])
def test_averages_are_rounded_as_asked(rounding: str, width: int, tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", layers_of([64, 128, 256, 256, 7, 6, 512, 512]))  # 6.5 of 512
    assert kept(target_of("guided", sources=[source], size=1.0, rounding=rounding))[4:6] == [width, width]


def test_a_size_multiplies_the_shares_and_no_layer_gets_wider_than_it_was(halves: str) -> None:
    assert kept(target_of("guided", sources=[halves], size=2.5)) == [64, 80, 240, 240, 240, 240, 320, 320]
    assert kept(target_of("guided", sources=[halves], size=1e-6)) == [1] * 8
    with pytest.raises(UserError, match=r"pruner\.size=6\.0: removes nothing from vgg11"):
        target_of("guided", sources=[halves], size=6)


@pytest.mark.parametrize("target", [{"target_macs": 0.3}, {"target_params": 0.3}, {"target_params": 1_000_000}])
def test_a_cost_is_met_by_one_factor(target: dict[str, float], halves: str) -> None:
    found = target_of("guided", sources=[halves], **target)
    ((name, value),) = target.items()
    quantity = name.removeprefix("target_")
    wanted = value * getattr(found.full_cost, quantity) if value < 1 else value
    assert getattr(found.cost, quantity) == pytest.approx(wanted, rel=0.01)
    widths = kept(found)
    wide = zip(widths, VGG11.values(), each_layer(SHARES), strict=True)
    factors = [width / (full * share) for width, full, share in wide if width < full]
    assert max(factors) - min(factors) < 0.05


def test_layer_by_layer_it_averages_over_sources_alone(halves: str, tmp_path: Path) -> None:
    second = write_run(tmp_path / "second", layers_of([64, 128, 128, 64, 128, 64, 64, 64]))
    found = kept(target_of("guided", sources=[halves, second], size=1.0, match="layer"))
    assert found == [48, 80, 128, 64, 128, 64, 64, 128]


def test_a_pattern_is_transferred_stage_by_stage(halves: str) -> None:
    found = kept(target_of("guided", "vgg19", sources=[halves], size=1.0))
    full = (64, 128, 256, 512, 512)
    assert found == [
        int(share * width)
        for share, width, layers in zip(SHARES, full, VGG19_LAYERS, strict=True)
        for _ in range(layers)
    ]


def test_it_prunes_what_the_sources_pruned() -> None:
    """Uniform pruning has the layers of slimming; `guided` those of its sources."""
    layers = kept(target_of("uniform", "preresnet20", ratio=0.5))
    assert len(layers) == len(kept(target_of("slimming", "preresnet20", ratio=0.5)))
    assert len(layers) > len(kept(target_of("l1", "preresnet20", ratio=0.5)))


@pytest.mark.parametrize(
    ("pruner", "network"),
    [("l1", "preresnet20"), ("uniform", "preresnet20"), ("regression", "preresnet20"), ("l1", "resnet20")],
)
def test_a_network_guided_by_its_own_uniform_one_is_that_one(pruner: str, network: str, tmp_path: Path) -> None:
    target = target_of(pruner, network, ratio=0.5)
    layers = [vars(layer) for layer in target.report().layers]
    source = write_run(tmp_path / "run", layers, {**VGG11_NETWORK, "name": network})
    guided = target_of("guided", network, sources=[source], size=1.0)
    assert guided.report().layers == target.report().layers
    assert architecture_key(guided.known_architecture) == architecture_key(target.known_architecture)


# ---- patterns ------------------------------------------------------------------------------------------------

CORNERS = torch.tensor([[0.1, 0.5, 0.1], [0.5, 0.8, 0.5], [0.1, 0.5, 0.1]])


@pytest.fixture
def masked(tmp_path: Path) -> str:
    """A prune stage: everywhere half as much in the second layer of a stage as in the first."""
    later = {layers[1] for layers in STAGES if len(layers) > 1}
    return write_masks(tmp_path / "prune-1", {f"features.{n}": CORNERS / (2 if n in later else 1) for n in VGG11})


def position_shares(target: Target, layer: str) -> torch.Tensor:
    return target.known_architecture.masks[f"{layer}.weight"].double().mean(dim=(0, 1))


def test_a_sampled_pattern_keeps_each_position_as_often_as_the_sources(masked: str) -> None:
    target = target_of("guided", sources=[masked], size=1.0)
    torch.testing.assert_close(position_shares(target, "features.4"), CORNERS.double(), atol=2e-4, rtol=0)
    for layer in ("features.8", "features.11"):
        torch.testing.assert_close(position_shares(target, layer), 0.75 * CORNERS.double(), atol=2e-4, rtol=0)
    larger = position_shares(target_of("guided", sources=[masked], size=1.5), "features.4")
    torch.testing.assert_close(larger, (1.5 * CORNERS).clamp(max=1).double(), atol=2e-4, rtol=0)


def test_a_top_pattern_fills_the_best_positions(masked: str) -> None:
    # The shares add up to 3.2: the middle, two of its neighbours, and a fifth of the third.
    shares = position_shares(target_of("guided", sources=[masked], size=1.0, pattern="top"), "features.4")
    expected = torch.tensor([[0, 1, 0], [1, 1, 0.2], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, atol=2e-4, rtol=0)


def test_the_seed_draws_the_kernels_and_a_larger_network_keeps_what_a_smaller_one_keeps(masked: str) -> None:
    def masks(**options: Any) -> torch.Tensor:
        return target_of("guided", sources=[masked], **options).known_architecture.masks["features.8.weight"]

    first = masks(size=1.0)
    assert torch.equal(first, masks(size=1.0))
    assert not torch.equal(first, masks(size=1.0, seed=1))
    assert bool((masks(size=1.2) | ~first).all())
    # No kernel is like its neighbours: the draw knows nothing of channels.
    assert first.double().mean(dim=(1, 2, 3)).std() < 0.02


@pytest.mark.parametrize("pattern", ["sample", "top"])
def test_masks_meet_a_cost(pattern: str, masked: str) -> None:
    target = target_of("guided", sources=[masked], target_params=0.2, pattern=pattern)
    assert target.cost.params == pytest.approx(0.2 * target.full_cost.params, rel=0.01)
    assert sum(kept(target)) == sum(int(mask.sum()) for mask in target.known_architecture.masks.values())


def test_masks_are_transferred_to_a_deeper_network(masked: str) -> None:
    target = target_of("guided", "vgg19", sources=[masked], size=1.0)
    assert len(kept(target)) == sum(VGG19_LAYERS)
    torch.testing.assert_close(position_shares(target, "features.7"), CORNERS.double(), atol=2e-4, rtol=0)


# ---- uniform -------------------------------------------------------------------------------------------------


def test_uniform_channels_are_those_of_l1() -> None:
    for options in ({"ratio": 0.3}, {"target_macs": 0.5}, {"widths": {"features.0": 5}}, {"ratio": 0.5, "round_to": 8}):
        uniform, l1 = target_of("uniform", **options), target_of("l1", **options)
        assert architecture_key(uniform.known_architecture) == architecture_key(l1.known_architecture)
        assert uniform.cost == l1.cost


def test_uniform_weights_are_the_same_share_of_every_convolution() -> None:
    target = target_of("uniform", what="weights", ratio=0.75)
    masks = target.known_architecture.masks
    assert len(masks) == len(VGG11)
    for layer in target.report().layers:
        assert int(masks[f"{layer.layer}.weight"].sum()) == layer.kept == int(0.25 * layer.full)
    drawn = masks["features.8.weight"].double()
    assert (drawn.mean(dim=(0, 1)) - 0.25).abs().max() < 0.01, "every position of a kernel alike"
    again, other = (target_of("uniform", what="weights", ratio=0.75, seed=seed).known_architecture for seed in (0, 1))
    assert torch.equal(again.masks["features.8.weight"].double(), drawn)
    assert not torch.equal(other.masks["features.8.weight"].double(), drawn)
    assert target.cost == count_cost(build_model("vgg11"), (3, 32, 32), masks=masks)


@pytest.mark.parametrize("target", [{"target_macs": 0.3}, {"target_params": 0.3}])
def test_uniform_weights_meet_a_cost(target: dict[str, float]) -> None:
    found = target_of("uniform", what="weights", **target)
    quantity = next(iter(target)).removeprefix("target_")
    assert getattr(found.cost, quantity) == pytest.approx(0.3 * getattr(found.full_cost, quantity), rel=0.01)
    shares = [layer.kept / layer.full for layer in found.report().layers[1:]]
    assert max(shares) - min(shares) < 0.001


def test_in_python_the_seed_decides() -> None:
    def masks(seed: int) -> torch.Tensor:
        result = prune(build_model("vgg11"), "uniform", example=EXAMPLE, ratio=0.5, what="weights", seed=seed)
        mask = result.architecture.masks["features.4.weight"]
        assert not result.model.get_parameter("features.4.weight")[~mask].any()
        return mask

    assert torch.equal(masks(3), masks(3))
    assert not torch.equal(masks(3), masks(4))


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "round_to": 8}, r"pruner\.round_to=8: of no use with single weights"),
        ({"widths": {"features.0": 3}}, r"pruner\.widths=.*: of no use with single weights"),
        ({"ratio": 0.5, "scope": "all"}, r"pruner\.scope=all: of no use with single weights"),
        ({}, r"no target: give exactly one of ratio"),
        ({"ratio": 0.5, "rounds": 2}, "pruner.rounds=2"),
    ],
)
def test_what_uniform_weights_do_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(build_model("vgg11"), "uniform", example=EXAMPLE, what="weights", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1.0, "sources": []}, r"pruner\.sources=\[\]: must name pruned networks"),
        ({"size": 1.0, "sources": "???"}, r"pruner\.sources=\?\?\?: must name pruned networks"),
        ({"size": 1.0}, r"pruner\.sources: missing"),
        ({"sources": ["x"]}, r"no target: give exactly one of size, target_macs, target_params, e\.g\. pruner\.size=1"),
        ({"sources": ["x"], "ratio": 0.5}, r"ratio: is no target of guided; give one of size, "),
        ({"sources": ["x"], "size": 1.0, "target_macs": 0.5}, r"for target_macs, add pruner\.size=null"),
        ({"sources": ["x"], "size": 1.0}, r"pruner\.sources: x: no such folder or file; give prune stages, runs"),
    ],
)
def test_options_that_say_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_of("guided", **options)


def test_sources_that_do_not_fit(halves: str, masked: str, tmp_path: Path) -> None:
    three = [{"layer": f"layer{n}.0.conv1", "kept": 4, "full": 16 * 2 ** (n - 1)} for n in (1, 2, 3)]
    resnet = write_run(tmp_path / "resnet", three, {**VGG11_NETWORK, "name": "resnet20"})
    own = write_run(tmp_path / "own", three, {**VGG11_NETWORK, "name": "mine:build"})
    for options, message in (
        ({"sources": [resnet]}, r"the sources have 3 layer stages and vgg11 has 5"),
        ({"sources": [halves, resnet]}, rf"{resnet} has 3 layer stages and {halves} 5"),
        ({"sources": [halves, masked]}, r"one has lost channels, the other weights"),
        ({"sources": [resnet], "match": "layer"}, rf"{resnet} is of resnet20, and this study of vgg11"),
        ({"sources": [own]}, r"is of mine:build, a network of your own"),
        ({"sources": [masked], "round_to": 8}, r"pruner\.round_to=8: of no use with single weights"),
        ({"sources": [masked], "min_share": 0.1}, r"pruner\.min_share=0\.1: of no use with single weights"),
    ):
        with pytest.raises(UserError, match=message):
            target_of("guided", size=1.0, **options)
    shapes = {"layer1.0.conv1": (16, 16), "layer2.0.conv1": (32, 16), "layer3.0.conv1": (64, 32)}
    masks = {name: torch.ones(*shape, 3, 3).cumsum(0) < 5 for name, shape in shapes.items()}
    layers = [{"layer": name, "kept": int(mask.sum()), "full": mask.numel()} for name, mask in masks.items()]
    architecture = Architecture(masks={f"{name}.weight": mask for name, mask in masks.items()})
    stage = write_stage(tmp_path / "prune-3", {"report": {"layers": layers}}, architecture, name="resnet20")
    with pytest.raises(UserError, match=r"no source has kernels of 1 x 1 in that layer stage: layer1\.0\.conv1 of"):
        target_of("guided", "preresnet20", size=1.0, sources=[stage])


def test_sources_that_are_damaged_or_not_pruned(halves: str, masked: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole = write_run(tmp_path / "whole", layers_of(list(VGG11.values())))
    unfinished = write_run(tmp_path / "unfinished", [])
    (tmp_path / "unfinished/summary.json").write_text('{"study": {}}')
    broken = write_run(tmp_path / "broken", [])
    (tmp_path / "broken/summary.json").write_text("{")
    gone = write_run(tmp_path / "gone", [{**layer, "kept": 0} for layer in layers_of([1] * 8)])
    other = write_run(tmp_path / "other", [{"layer": "conv1", "kept": 4, "full": 16}])
    report = json.loads((Path(masked) / "status.json").read_text())["result"]["report"]
    counted = write_run(tmp_path / "counted", report["layers"])
    large = write_stage(tmp_path / "large-1", {"top1": 50}, Architecture())
    blocks = write_stage(
        tmp_path / "prune-2", {"report": {"layers": layers_of([1] * 8)}}, Architecture(removed=("features.0",))
    )
    (tmp_path / "results.json").write_text('{"format": "rethink-prune results", "runs": []}')
    for source, message in (
        (tmp_path / "empty", "holds no stage and no run"),
        (whole, "is not pruned: every layer is whole"),
        (unfinished, "is damaged, or not finished"),
        (broken, r"summary\.json: cannot be read"),
        (gone, "has lost whole blocks"),
        (blocks, "has lost whole blocks"),
        (other, "is damaged: its layers are not those of its network"),
        (counted, "has lost single weights, and which ones is not recorded there"),
        (large, "is no prune stage"),
        (tmp_path / "results.json", r"is no results\.json of a report, or holds no run"),
    ):
        with pytest.raises(UserError, match=rf"^pruner\.sources: .*{message}"):
            target_of("guided", sources=[str(source)], size=1.0)
    (Path(masked) / "architecture.json").write_text("{}")
    with pytest.raises(UserError, match=r"pruner\.sources: .*is damaged \(its checksum does not match\)"):
        target_of("guided", sources=[masked], size=1.0)
    status = json.loads((Path(large) / "status.json").read_text())
    (Path(large) / "status.json").write_text(json.dumps({**status, "state": "running"}))
    with pytest.raises(UserError, match=r"not a finished stage \(state: running\)"):
        target_of("guided", sources=[large], size=1.0)
