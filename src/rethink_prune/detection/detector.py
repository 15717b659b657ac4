"""Faster R-CNN around a classifier: torchvision's, with the classifier's body and head, and frozen batch norms."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

from rethink_prune.config import TransferConfig
from rethink_prune.cost import Cost, count_cost, output_sizes
from rethink_prune.detection.split import Parts, split_classifier
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import Architecture, Masks, select_inputs, selects

# Where the parts of the classifier are in a detector.
_PARTS = ("backbone.body", "roi_heads.box_head.layers")
_PROPOSALS, _CLASSES, _BOXES = "rpn.head.conv", "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
# As in the published code; no study of pruning varies them.
_PUBLISHED = {
    "rpn_nms_thresh": 0.7,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.5,
    "box_fg_iou_thresh": 0.5,
    "box_bg_iou_thresh": 0.5,
    "box_positive_fraction": 0.25,
    "box_nms_thresh": 0.3,
    "box_detections_per_img": 100,
}


@dataclass(frozen=True)
class DetectorSpec:
    """What a detector is built for, beside the classifier; `options.root` and limits do not matter.

    Attributes
    ----------
    options : TransferConfig
    classes : tuple of str
        Without the background.
    mean, std : tuple of float
        By which the classifier's images were normalised, per channel, on the [0, 1] scale.
    input_shape : tuple of int
        Of one of its images, C x H x W.
    """

    options: TransferConfig
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]

    def plain(self) -> dict[str, Any]:
        """Return it as plain values, from which `from_plain` makes it again."""
        return {**asdict(self), "options": self.options.model_dump(mode="json")}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Return what `plain` described; raise ValueError or TypeError if it describes nothing."""
        tuples = {name: tuple(plain[name]) for name in ("classes", "mean", "std", "input_shape")}
        return cls(TransferConfig.model_validate(plain["options"]), **tuples)

    def split(self, classifier: nn.Module) -> Parts:
        """Split a classifier where the options say; raises `UserError` as `split_classifier`."""
        options = self.options
        return split_classifier(
            classifier.eval(),
            self.input_shape,
            stride=options.stride,
            body=options.body,
            head=options.head,
            region_size=options.region_size,
        )


def build_detector(classifier: nn.Module, spec: DetectorSpec) -> FasterRCNN:
    """Build a detector around a classifier, which becomes a part of it.

    The stem and the first stage, and all batch norms, are frozen. The other layers of the detector are drawn.

    Parameters
    ----------
    classifier : torch.nn.Module
        With its weights; changed in place.
    spec : DetectorSpec

    Raises
    ------
    UserError
        If the classifier cannot be split, or has a batch norm that cannot be frozen.

    Examples
    --------
    >>> import torch
    >>> from rethink_prune import build_model
    >>> options = TransferConfig(name="voc", stride=4, epochs=1, lr=0.001)
    >>> spec = DetectorSpec(options, ("cat",), (0.5,) * 3, (0.25,) * 3, (3, 32, 32))
    >>> detector = build_detector(build_model("resnet20"), spec)
    >>> found = detector.eval()([torch.zeros(3, 64, 48)])
    >>> sorted(found[0])
    ['boxes', 'labels', 'scores']
    """
    options, sizes = spec.options, output_sizes(classifier, spec.input_shape)
    parts = spec.split(classifier)
    _freeze_first_stages(classifier, sizes, options.frozen_stages)
    freeze_norms(parts.body)
    freeze_norms(parts.head)
    anchors = AnchorGenerator((options.anchor_sizes,), (options.anchor_ratios,))
    return FasterRCNN(
        _Backbone(parts.body, parts.channels),
        min_size=options.min_size,
        max_size=options.max_size,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        rpn_anchor_generator=anchors,
        rpn_head=_ProposalHead(parts.channels, options.proposal_channels, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=options.proposals_train[0],
        rpn_post_nms_top_n_train=options.proposals_train[1],
        rpn_pre_nms_top_n_test=options.proposals_test[0],
        rpn_post_nms_top_n_test=options.proposals_test[1],
        box_roi_pool=MultiScaleRoIAlign(["0"], options.region_size, sampling_ratio=2),
        box_head=parts.head,
        box_predictor=_predictor(parts.features, len(spec.classes) + 1),
        box_batch_size_per_image=options.regions,
        box_score_thresh=options.score_threshold,
        **_PUBLISHED,
    )


class _Backbone(nn.Module):
    """The body, as torchvision's detectors want it."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the features of N x C x H x W pictures."""
        return {"0": self.body(pictures)}


class _ProposalHead(nn.Module):
    """One 3 x 3 convolution and two 1 x 1 ones that score and move anchors; its width is not that of the body."""

    def __init__(self, channels: int, width: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.cls_logits = nn.Conv2d(width, anchors, 1)
        self.bbox_pred = nn.Conv2d(width, 4 * anchors, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the scores and moves of the anchors of each map."""
        hidden = [self.conv(each).relu() for each in features]
        return [self.cls_logits(each) for each in hidden], [self.bbox_pred(each) for each in hidden]


def _predictor(features: int, classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(features, classes)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return predictor


class _FrozenBatchNorm1d(FrozenBatchNorm2d):
    """The same for N x C."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        return super().forward(x[:, :, None, None]).flatten(1)


def freeze_norms(model: nn.Module) -> None:
    """Replace batch norms, in place, by those whose statistics, scales and shifts stay as they are.

    Raises
    ------
    UserError
        If one keeps no statistics, or is of a class that does more.

    Examples
    --------
    >>> model = nn.Sequential(nn.BatchNorm2d(4))
    >>> freeze_norms(model)
    >>> model[0]
    FrozenBatchNorm2d(4, eps=1e-05)
    """
    kinds: dict[type, type[FrozenBatchNorm2d]] = {nn.BatchNorm2d: FrozenBatchNorm2d, nn.BatchNorm1d: _FrozenBatchNorm1d}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        kind = kinds.get(type(module))
        if kind is None or module.running_mean is None or module.running_var is None:
            raise UserError(f"transfer: {name} is a {type(module).__name__} that cannot be frozen")
        frozen = kind(module.num_features, module.eps)
        frozen.running_mean.copy_(module.running_mean)
        frozen.running_var.copy_(module.running_var)
        if module.affine:
            frozen.weight.copy_(module.weight.detach())
            frozen.bias.copy_(module.bias.detach())
        if selects(module):
            select_inputs(frozen, cast(Tensor, module.selected))
        model.set_submodule(name, frozen)


def _freeze_first_stages(classifier: nn.Module, sizes: Mapping[str, tuple[int, ...]], stages: int) -> None:
    """Freeze the convolutions of the largest output sizes."""
    convolutions = {name: m for name, m in classifier.named_modules() if isinstance(m, nn.Conv2d) and name in sizes}
    largest = sorted({sizes[name] for name in convolutions}, reverse=True)
    if stages > len(largest):
        raise UserError(f"transfer.frozen_stages={stages}: the network has convolutions of {len(largest)} output sizes")
    largest = largest[:stages]
    for name, module in convolutions.items():
        if sizes[name] in largest:
            module.requires_grad_(requires_grad=False)


def sampled_part(model: nn.Module) -> nn.Module:
    """Return what gives a sample of a network's outputs: a detector's body, any other network itself.

    Examples
    --------
    >>> sampled_part(nn.Identity())
    Identity()
    """
    return cast(nn.Module, model.backbone.body) if isinstance(model, FasterRCNN) else model


def detector_masks(detector: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return a classifier's masks by the names that its parameters have in a detector."""
    parameters = dict(detector.named_parameters())
    named = ((f"{part}.{name}", mask) for name, mask in masks.items() for part in _PARTS)
    return {name: mask for name, mask in named if name in parameters}


def classifier_state(detector: Mapping[str, Tensor], classifier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a classifier's state with the weights that a detector made of them; what is not in one stays.

    Examples
    --------
    >>> import torch
    >>> classifier = {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    >>> classifier_state({"backbone.body.conv1.weight": torch.ones(1)}, classifier)
    {'conv1.weight': tensor([1.]), 'fc.weight': tensor([0.])}
    """
    found = {}
    for name, tensor in classifier.items():
        inside = [detector[f"{part}.{name}"] for part in _PARTS if f"{part}.{name}" in detector]
        found[name] = inside[0] if inside else tensor
    return found


def narrowed_state(
    trained: Mapping[str, Tensor], detector: nn.Module, *, before: Parts, after: Parts, architecture: Architecture
) -> dict[str, Tensor]:
    """Return the state of a detector around a pruned classifier, its other layers those of the trained detector.

    Parameters
    ----------
    trained : mapping of str to Tensor
        State of the detector whose classifier was pruned.
    detector : torch.nn.Module
        The one around the pruned classifier, of which the classifier's weights are taken.
    before, after : Parts
        Of the two classifiers.
    architecture : Architecture
        What pruning left, relative to the first; with positions.

    Raises
    ------
    UserError
        If it is not known which channels of the features remain.
    """
    read = _positions(architecture, before.feature_reader, before.channels, after.channels)
    features = _positions(architecture, before.classifier, before.features, after.features)
    kept = {f"{_PROPOSALS}.weight": read, f"{_CLASSES}.weight": features, f"{_BOXES}.weight": features}
    state = detector.state_dict()
    for name in state:
        if not name.startswith(_PARTS):
            positions = kept.get(name)
            state[name] = trained[name] if positions is None else trained[name].index_select(1, positions)
    return state


def _positions(architecture: Architecture, reader: str, before: int, after: int) -> Tensor | None:
    """Return which channels of a stream remain, as its reader says; None for all of them."""
    if after == before:
        return None
    inputs = architecture.inputs.get(reader)
    if inputs is None:
        raise UserError(f"transfer: prune_d: it is not known which channels {reader} still reads")
    # A linear layer may read several positions of each channel.
    kept = inputs if len(inputs) == after else (inputs // max(1, len(inputs) // after)).unique()
    if len(kept) != after:  # it reads another map than regions are
        raise UserError(f"transfer: prune_d: {reader} reads other positions than a region has; take transfer.head=pool")
    return kept


def detector_cost(detector: FasterRCNN, spec: DetectorSpec, picture_size: tuple[int, int], masks: Masks) -> Cost:
    """Count parameters, and MACs of one picture: body, proposals, and as many regions as are sampled in training.

    Parameters
    ----------
    detector : FasterRCNN
    spec : DetectorSpec
        What it was built for.
    picture_size : tuple of int
        Height and width of the picture as the body gets it.
    masks : mapping of str to Tensor
        Of the classifier's weights, by its names; masked ones are not counted.
    """
    body, head = cast(nn.Module, detector.backbone), cast(nn.Module, detector.roi_heads.box_head)
    named = [
        {name: mask for name, mask in masks.items() if name in dict(part.named_parameters())}
        for part in (cast(nn.Module, body.body), cast(nn.Module, head.layers))
    ]
    channels, stride, size = cast(int, body.out_channels), spec.options.stride, spec.options.region_size
    features = (channels, *(-(-side // stride) for side in picture_size))
    whole = [
        count_cost(cast(nn.Module, body.body), (len(spec.mean), *picture_size), masks=named[0]),
        count_cost(_OneMap(cast(nn.Module, detector.rpn.head)), features),
    ]
    predictor = cast(Any, detector.roi_heads.box_predictor)
    regions = [
        count_cost(cast(nn.Module, head.layers), (channels, size, size), masks=named[1]),
        count_cost(predictor, (predictor.cls_score.in_features,)),
    ]
    macs = sum(each.macs for each in whole) + spec.options.regions * sum(each.macs for each in regions)
    return Cost(sum(each.params for each in (*whole, *regions)), macs)


class _OneMap(nn.Module):
    """The proposal head for a single map."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Any:
        """Return what the head gives."""
        return self.head([features])
