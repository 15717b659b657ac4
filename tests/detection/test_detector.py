"""The detector around a classifier: what is frozen, what a pruned one keeps, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops.misc import FrozenBatchNorm2d

from harness import Net, configure, mask, randomise
from rethink_prune.config import TransferConfig
from rethink_prune.cost import Cost
from rethink_prune.detection.detector import (
    DetectorSpec,
    build_detector,
    classifier_state,
    detector_cost,
    detector_masks,
    freeze_norms,
    narrowed_state,
)
from rethink_prune.detection.task import Detection, DetectorHooks
from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.pruning import find_pruner
from rethink_prune.state import load_full_state
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply
from rethink_prune.training.distributed import ALONE
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime, prepare_runtime


def spec(side: int, *, classes: int = 3, **options: Any) -> DetectorSpec:
    small = {"stride": 4, "min_size": 64, "max_size": 96, "anchor_sizes": (16, 32), "proposal_channels": 8}
    config = TransferConfig(name="voc", epochs=1, lr=0.01, **{**small, "regions": 16, **options})
    names = tuple("abcdefghi"[:classes])
    return DetectorSpec(config, names, (0.5,) * 3, (0.25,) * 3, (3, side, side))


def pruned(network: str, ratio: float, *overrides: str) -> tuple[nn.Module, nn.Module, Architecture]:
    """Return a network of random values, what a pruner leaves of it, and its architecture."""
    config = configure(f"model={network}", f"pruner.ratio={ratio}", *overrides)
    pruner = find_pruner(config.pruner.name)(config.pruner)
    model = randomise(build_model(network)).float()
    target = pruner.target(model, torch.zeros(1, 3, 16, 16), network)
    result = pruner.prune(model, target, data=(), generator=torch.Generator())  # type: ignore[arg-type]
    return model, result.model, result.architecture


@pytest.mark.parametrize("network", ["vgg5", "preresnet20", "densenet40"])
def test_frozen_norms_compute_what_batch_norms_do_in_evaluation(network: str) -> None:
    # Selections, and a batch norm after a linear layer, come with these.
    _, model, architecture = pruned(network, 0.4, "pruner=slimming")
    assert bool(architecture.selections) == (network != "vgg5")
    model.double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        names = list(model.state_dict())
        model.float()  # frozen norms keep what they get in float32
        freeze_norms(model)
        model.double().train()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert not norms
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == [name for name in names if not name.endswith("num_batches_tracked")]
    assert not any(isinstance(m, FrozenBatchNorm2d) and list(m.parameters()) for m in model.modules())


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d"), (nn.InstanceNorm2d(4), "InstanceNorm2d")],
)
def test_norms_that_cannot_be_frozen_are_refused(norm: nn.Module, kind: str) -> None:
    with pytest.raises(UserError, match=f"transfer: 1 is a {kind} that cannot be frozen"):
        freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 1), norm))


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_the_stem_and_the_first_stages_are_frozen() -> None:
    def of_resnet(stages: int) -> set[str]:
        classifier = models.resnet34(num_classes=4)
        build_detector(classifier, spec(64, stride=16, frozen_stages=stages))
        return frozen(classifier)

    layer1 = {f"layer1.{block}.conv{number}.weight" for block in range(3) for number in (1, 2)}
    assert of_resnet(0) == set()
    assert of_resnet(1) == {"conv1.weight"}
    assert of_resnet(2) == {"conv1.weight", *layer1}

    with torch.device("meta"):
        classifier = models.vgg16(num_classes=4)
        classifier.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(), nn.Linear(8, 4))
    classifier.to_empty(device="cpu")
    build_detector(classifier, spec(64, stride=16))
    assert frozen(classifier) == {f"features.{n}.{kind}" for n in (0, 2, 5, 7) for kind in ("weight", "bias")}


def step(detector: nn.Module, hooks: DetectorHooks, lr: float) -> None:
    optimizer = torch.optim.SGD(hooks.optimized(detector), lr=lr, momentum=0.9, weight_decay=0.01)
    hooks.prepare(detector)
    runtime = prepare_runtime("cpu", "fp32")
    run = Detection(("a", "b", "c")).build_step(detector, optimizer, hooks, runtime=runtime, forward=detector.train())
    torch.manual_seed(0)
    for _ in range(2):
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])}
        assert run([torch.rand(3, 64, 64)], [target]).isfinite().all()


def test_training_leaves_masked_and_frozen_weights_alone() -> None:
    classifier = build_model("resnet20")
    names = ("conv1.weight", "layer2.1.conv1.weight", "layer3.0.conv2.weight", "fc.weight")
    masks = {name: torch.rand(classifier.get_parameter(name).shape) < 0.5 for name in names}
    apply_masks(classifier, masks)
    start = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    detector = build_detector(classifier, spec(32, stride=2, frozen_stages=1))
    step(detector, DetectorHooks(detector_masks(detector, masks), clip_norm=1.0), lr=0.1)
    trained = classifier_state(detector.state_dict(), start)
    for name in names:
        assert not trained[name][~masks[name]].any(), name
    # The stem and first stage, and all batch norms; `fc` is in no detector.
    same = {name for name, tensor in trained.items() if torch.equal(tensor, start[name])}
    changed = {f"layer{s}.{b}.conv{n}.weight" for s in (2, 3) for b in range(3) for n in (1, 2)}
    assert start.keys() - same == changed


def test_the_gradients_of_all_parameters_together_are_limited() -> None:
    detector = build_detector(build_model("vgg5"), spec(16))
    hooks = DetectorHooks({}, clip_norm=1e-3)
    for parameter in hooks.optimized(detector):
        parameter.grad = torch.ones_like(parameter)
    hooks.before_step(detector, 0.1)
    total = torch.stack([p.grad.norm() for p in hooks.optimized(detector) if p.grad is not None]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


def flattening() -> nn.Module:
    """Return a network whose hidden layer reads 7 x 7 positions of each channel, and has a batch norm."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.pool(net.norm(net.b(net.a(x).relu())).relu()).flatten(1)
        return net.fc(net.hidden_norm(net.hidden(x)).relu())

    return Net(
        forward,
        a=nn.Conv2d(3, 6, 3, stride=2, padding=1),
        b=nn.Conv2d(6, 8, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(8),
        pool=nn.AdaptiveAvgPool2d(7),
        hidden=nn.Linear(8 * 49, 10),
        hidden_norm=nn.BatchNorm1d(10),
        fc=nn.Linear(10, 5),
    )


def check_narrowed(model: nn.Module, drop: dict[str, list[int]], of: DetectorSpec) -> None:
    """Compare the detector around the pruned network with the trained one whose removed channels are zero."""
    side = of.input_shape[1]
    channels = analyse(model, torch.zeros(1, 3, side, side, dtype=torch.float64))
    narrow, architecture = apply(model, channels.plan(drop))
    before, after = of.split(model), of.split(narrow)
    masked = mask(model, channels, drop).float()
    zeroed = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    whole = randomise(build_detector(masked, of), seed=2).float()
    # The detector's own layers are as after a training. The classifier's are put back, with zeros for what goes.
    whole.load_state_dict(in_detector(zeroed), strict=False)
    trained = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    detector = build_detector(narrow.float(), of)
    state = narrowed_state(trained, detector, before=before, after=after, architecture=architecture)
    load_full_state(detector, state)
    pictures = [torch.rand(3, 64, 80, dtype=torch.float64), torch.rand(3, 72, 64, dtype=torch.float64)]
    outputs = []
    for each in (whole, detector):
        each.double().eval()
        with torch.no_grad():
            images, _ = each.transform(pictures)
            proposals, moves = each.rpn.head(list(each.backbone(images.tensors).values()))
            found = each(pictures)
        outputs.append([*proposals, *moves, *(boxes[key] for boxes in found for key in ("boxes", "scores"))])
    for expected, got in zip(*outputs, strict=True):
        assert expected.numel()
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)
    assert outputs[0][0].std() > 1e-3


def in_detector(classifier: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a classifier's state by the names that it may have in a detector."""
    parts = ("backbone.body", "roi_heads.box_head.layers")
    return {f"{part}.{name}": tensor for part in parts for name, tensor in classifier.items()}


@pytest.mark.parametrize("drop", [{"features.14": [0, 7, 40]}, {"features.0": [1, 5], "classifier.0": [3, 100, 511]}])
def test_a_pruned_vgg_goes_on_with_the_trained_detector(drop: dict[str, list[int]]) -> None:
    # The body's last convolution, which the proposals and the head read; a layer inside, and the head's features.
    check_narrowed(randomise(build_model("vgg5", head="mlp")), drop, spec(16))


def test_a_head_that_flattens_its_regions_goes_on_with_the_trained_detector() -> None:
    check_narrowed(randomise(flattening()), {"b": [0, 3], "hidden": [9]}, spec(32))


def test_a_last_layer_that_reads_another_map_than_regions_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 5)).eval()
    narrow, architecture = apply(model, analyse(model, torch.zeros(1, 3, 32, 32)).plan({"0": [1]}))
    of = spec(32, frozen_stages=1)
    before, after = of.split(model), of.split(narrow)
    trained, detector = build_detector(model, of).state_dict(), build_detector(narrow, of)
    with pytest.raises(
        UserError, match=r"prune_d: 3 reads other positions than a region has; take transfer\.head=pool"
    ):
        narrowed_state(trained, detector, before=before, after=after, architecture=architecture)


def test_cost_is_that_of_body_proposals_and_sampled_regions() -> None:
    classifier = flattening()
    of = spec(32, classes=3, regions=16, anchor_ratios=(0.5, 1.0))
    masks = {"b.weight": torch.ones(8, 6, 3, 3, dtype=torch.bool), "hidden.weight": torch.ones(10, 392) > 0}
    masks["b.weight"][:4] = False
    masks["hidden.weight"][:5] = False
    detector = build_detector(classifier, of)
    # A picture of 64 x 90: features of 16 x 23; 2 sizes x 2 ratios.
    body = 32 * 45 * 6 * 27 + 16 * 23 * 8 * 54
    proposals = 16 * 23 * (8 * 8 * 9 + 8 * 4 + 8 * 16)
    region = 392 * 10 + 10 * 4 + 10 * 16
    params = (6 * 27 + 6 + 8 * 54 + 8) + (8 * 72 + 8 + 9 * 4 + 9 * 16) + (392 * 10 + 10 + 11 * 4 + 11 * 16)
    assert detector_cost(detector, of, (64, 90), {}) == Cost(params, body + proposals + 16 * region)
    half = Cost(params - 216 - 1960, body - 16 * 23 * 4 * 54 + proposals + 16 * (region - 1960))
    assert detector_cost(detector, of, (64, 90), masks) == half


def test_a_detector_that_its_last_step_broke_is_no_result() -> None:
    detector = nn.Linear(1, 1)
    judge = Detection(("cat",)).build_judge(
        detector, TrainingHooks(), runtime=Runtime(torch.device("cpu"), "fp32"), processes=ALONE
    )
    with torch.no_grad():
        detector.weight.fill_(math.inf)
    assert math.isnan(judge(None)["loss"])


def test_more_frozen_stages_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"transfer\.frozen_stages=9: the network has convolutions of 3 output sizes"):
        build_detector(build_model("vgg5"), spec(32, frozen_stages=9))
