"""Channel pruning by regression (He, Zhang, Sun 2017, *Channel Pruning for Accelerating Very Deep Neural Networks*).

arXiv:1707.06168. Layer by layer, from the input on, for random positions in the output of the layer that reads the
channels. With ``x[c]`` what it reads of channel ``c``, ``W[c]`` its weights for that, and ``y`` its output without bias
in the unpruned network:

1. LASSO selects the channels, with as large a penalty as leaves the wanted number of coefficients ``beta``::

       min over beta: |y - sum over c of beta[c] * x[c] W[c]^T|^2 / 2 + penalty * |beta|_1

2. Least squares reconstructs the output from those ``x_S`` that stay, with a ridge towards the weights they have. So
   the error on the sample is never above that of removing the channels and leaving the weights as they are::

       min over W': |y - x_S W'^T|^2 + rho * |W' - W_S|^2,    rho = ridge * mean of the diagonal of x_S^T x_S

   With ``intercept=true``, both have an intercept beside, for layers that have a bias, and it joins the bias; so it is
   in the authors' code. The paper's formulas have none.

   The ridge is the one, of powers of ten, with the least error on every fifth image, which the fit leaves out at first:
   a sample of hardly more positions than a filter has weights would otherwise be fitted, and nothing else. The smallest
   is 1e-6: what is read of tokens can be of lower rank than it has numbers (hidden units that agree on all tokens, the
   numbers of a head), and then any smaller one would leave weights to rounding.

Hidden units behind tokens are channels of the linear layer that reads them, tokens are positions, and a head is a
channel with as many inputs as it is wide: LASSO selects it as a whole, and each input has weights of its own.

``x`` is sampled through the part that is already pruned, ``y`` in the unpruned network: errors do not pile up. Where
the layer's output is added to a shortcut, ``y`` also makes up for the shortcut's error, as seen through the batch norm
in between. The first convolution of a branch selects channels of the stream, which stays whole for the shortcut.
Where several layers read the channels, the selection is for the sum of their errors, and each is reconstructed by
itself. All of this needs only the Gram matrices ``x^T x`` and ``x^T y``; the first takes 8 bytes times the square of
the number of weights of one filter. The paper alternates selection and reconstruction and finds that once is enough.

``5x`` of VGG-16 and ``2x`` of ResNet-50 are the published targets, named after how much faster they are meant to be.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rethink_prune.config import Count
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.least_squares import Products, best_ridge, ridge_towards, select_by_lasso
from rethink_prune.pruning.pruner import Variants
from rethink_prune.pruning.reconstruction import ChannelReader, Reconstruction, ReconstructionPruner, SamplingOptions
from rethink_prune.pruning.samples import draw_places, output_positions, pieces, read_outputs, read_patches
from rethink_prune.surgery.channels import ChannelGroup

log = logging.getLogger(__name__)

# Every fifth image is held out to choose the ridge.
_HELD_OUT = 5
# The products of their pairs take 2 GiB.
_MOST_FEATURES = 16_384

# For each block of ResNet-50: channels selected from the stream, outputs of the first and of the second convolution.
_RESNET50_2X_BLOCKS = {
    "layer1": [(35, 64, 55), (101, 51, 39), (97, 50, 37)],
    "layer2": [(144, 128, 106), (205, 105, 72), (198, 105, 72), (288, 128, 110)],
    "layer3": [(278, 256, 225), (418, 209, 147), (407, 204, 158), (423, 212, 155), (412, 211, 148), (595, 256, 213)],
    "layer4": [(606, 512, 433), (1222, 512, 437), (1147, 512, 440)],
}
_RESNET50_2X = {
    f"{stage}.{number}.{layer}": width
    for stage, blocks in _RESNET50_2X_BLOCKS.items()
    for number, block in enumerate(blocks)
    for layer, width in zip(("conv1.selected", "conv1", "conv2"), block, strict=True)
}


class RegressionOptions(SamplingOptions):
    """Options of :class:`Regression`: how much to sample, and the ridge in units of the mean squared input.

    Without `ridge`, held-out images decide it. With `intercept`, biases are fitted as well.
    """

    positions_per_image: Count = 10
    intercept: bool = False
    # A smaller ridge would leave the equations singular to within rounding.
    ridge: Annotated[float, Field(ge=1e-10, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class ReaderSample:
    """A layer that reads the group, its `weight` for the group (C_out x columns x K), and what was sampled of it.

    The weights are fitted to the positions of most images; those `held_out` choose the ridge. With `intercept`, the
    layer's bias is fitted as well.
    """

    reader: ChannelReader
    weight: torch.Tensor
    fit: Products
    held_out: Products
    intercept: bool

    @property
    def whole(self) -> Products:
        """The products of all positions."""
        return self.fit + self.held_out


class Regression(ReconstructionPruner[RegressionOptions]):
    """Selects channels by LASSO, and reconstructs what reads them by least squares.

    :source: He et al. 2017
    :goes: channels, and inputs of residual branches
    :by: LASSO on the next layer's output, whose weights are then reconstructed
    """

    name = "regression"
    position = 3
    options_type = RegressionOptions
    published_images = 5000
    selecting = "conv"
    variants: ClassVar[Variants] = {
        "torchvision.models:vgg16": {"5x": {"widths": [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, *[512] * 3]}},
        "torchvision.models:resnet50": {"2x": {"widths": _RESNET50_2X}},
    }

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> ChannelTarget:
        """Find the channels that may go; refuse an intercept where no layer that reads them has a bias."""
        target = super().target(model, example, network)
        readers = {name for group in target.groups for name in target.channels.inputs(group)}
        if self.options.intercept and all(model.get_submodule(name).bias is None for name in readers):
            raise UserError(
                f"pruner.intercept=true: of the layers to fit in {network or type(model).__name__}, none has a bias; "
                "their batch norms subtract means"
            )
        return target

    def check_images(self, target: ChannelTarget, images: int) -> None:
        """Raise `UserError` if so many training images give fewer positions than a layer has channels."""
        positions = output_positions(target.shapes, target.input_shape, target.channels.graphs)
        images = min(images, self.images)
        for group, _ in target.narrowed():
            readers = target.channels.inputs(group)
            for name, units in readers.items():
                kernel = target.shapes.get_parameter(f"{name}.weight")[0, 0].numel()
                _check_features(name, group, sum(map(len, units)) * kernel)
            per_image = sum(min(positions.get(name, 0), self.options.positions_per_image) for name in readers)
            self._check_positions(group, images * per_image, images)

    def rewrite_readers(
        self, run: Reconstruction, group: ChannelGroup, width: int, readers: Sequence[ChannelReader]
    ) -> list[int]:
        """Select by the error of all readers, and reconstruct each for the units that stay."""
        samples = []
        for reader in readers:
            weight = run.current.weight(reader.layer)[:, reader.columns]
            # Again, for networks pruned from Python: no study has called `check_images` for them.
            _check_features(reader.layer, group, weight[0].numel())
            fit, held_out = (Products.zeros(weight[0].numel(), len(weight), weight.device) for _ in range(2))
            intercept = self.options.intercept and run.current.bias(reader.layer) is not None
            samples.append(ReaderSample(reader, weight, fit, held_out, intercept))
        seen = self._sample(run, samples)
        self._check_positions(group, sum(sample.whole.count for sample in samples), seen)
        kept = _select_units(group, width, samples)
        for sample in samples:
            self._reconstruct_reader(run, sample, kept)
        return sorted(set(range(group.size)) - set(kept))

    def _sample(self, run: Reconstruction, samples: Sequence[ReaderSample]) -> int:
        """Fill the sample of each reader; return how many images there were."""
        original, current = run.original, run.current
        shortcuts = {node: current.shortcut(node) for sample in samples for node in sample.reader.nodes}
        nodes = set(shortcuts) | {shortcut.addition for shortcut in shortcuts.values() if shortcut is not None}
        seen = 0
        for batch in run.images:
            now, before = current.read(nodes, batch), original.read(nodes, batch)
            for sample in samples:
                reader = sample.reader
                layer, full = current.layer(reader.layer), original.weight(reader.layer).flatten(1)
                others = current.weight(reader.layer)
                # The layer's weights for what it reads beside the group's channels.
                others[:, reader.columns] = 0
                # What fits for other groups have added to the bias; a layer without one has added nothing.
                biases = current.bias(reader.layer), original.bias(reader.layer)
                added = biases[0] - biases[1] if biases[0] is not None and biases[1] is not None else 0.0
                for node in reader.nodes:
                    inputs, shortcut = now[node][0], shortcuts[node]
                    places = draw_places(layer, inputs, self.options.positions_per_image, run.generator, distinct=True)
                    for piece in pieces(places, full.shape[1]):
                        x = read_patches(layer, inputs, piece)
                        y = read_patches(layer, before[node][0], piece).flatten(1) @ full.T
                        # Channels outside the group give this much already; the rest is to be fitted.
                        y -= x.flatten(1) @ others.flatten(1).T + added
                        # What is broadcast, such as a value per image, is no shortcut.
                        if shortcut is not None and len({value.shape for value in now[shortcut.addition]}) == 1:
                            values = (read[shortcut.addition][shortcut.operand] for read in (before, now))
                            then, today = (read_outputs(layer, value, piece) for value in values)
                            y += (then - today) * current.gain(shortcut, y.shape[1])
                        # By image, counted over all batches: positions of one image are alike.
                        held_out = (piece[0] + seen) % _HELD_OUT == _HELD_OUT - 1
                        x = x[:, reader.columns].flatten(1)
                        sample.fit.add(x[~held_out], y[~held_out])
                        sample.held_out.add(x[held_out], y[held_out])
                if not (sample.fit.finite and sample.held_out.finite):
                    raise UserError(
                        f"{reader.layer}: its weights or what it reads are not finite; regression needs numbers"
                    )
            seen += len(batch)
        return seen

    def _reconstruct_reader(self, run: Reconstruction, sample: ReaderSample, kept: Sequence[int]) -> None:
        """Fit the weights of a layer for the units that are kept, and write them into the working copy."""
        current, reader = run.current, sample.reader
        stays = torch.isin(reader.units, torch.tensor(kept, device=current.device))
        features = stays.repeat_interleave(sample.weight.shape[2])
        removal = sample.weight * stays[:, None]
        old = removal.flatten(1)[:, features].T.cpu().numpy()
        fit, held_out = sample.fit, sample.held_out
        if sample.intercept:
            # An intercept moves the means to zero; on held-out images, it is that of the fit.
            means = fit.means
            fit, held_out = fit.about(*means), held_out.about(*means)
        ridge = self.options.ridge or best_ridge(old, fit.of(features), held_out.of(features))
        # The ridge is chosen; from here on, the held-out images are fitted as well.
        sampled = sample.whole  # made once: it can take 2 GiB
        x_mean, y_mean = sampled.means
        whole = sampled.about(x_mean, y_mean) if sample.intercept else sampled
        part = whole.of(features)
        fitted = ridge_towards(old, part.xx.cpu().numpy(), part.xy.cpu().numpy(), ridge)
        new = torch.zeros_like(removal)
        new[:, stays] = torch.from_numpy(fitted.T.copy()).to(new).reshape(len(new), -1, new.shape[2])
        weight = current.weight(reader.layer)
        weight[:, reader.columns] = new
        bias = current.bias(reader.layer) if sample.intercept else None
        if bias is not None:
            bias += y_mean - new.flatten(1) @ x_mean
        current.rewrite(reader.layer, weight, bias)
        errors = sampled.error(removal), whole.error(new)
        message = "%s: keeps %d input channels; error %.4f after removal, %.4f after reconstruction (ridge %.0e)"
        log.info(message, reader.layer, int(stays.sum()), *errors, ridge)

    def _check_positions(self, group: ChannelGroup, positions: int, images: int) -> None:
        options = self.options
        if positions < group.size:
            raise UserError(
                f"pruner.positions_per_image={options.positions_per_image}: {images} images (pruner.images="
                f"{self.images}) give {positions} positions, too few for the {group.size} channels of {group.name}; "
                f"raise {self.limit_on_images(images)}, or pruner.positions_per_image if the layer's output has more "
                "positions"
            )


def _check_features(layer: str, group: ChannelGroup, features: int) -> None:
    """Refuse a layer of which the products would not fit into memory: a linear one behind a flatten, as a rule."""
    if features > _MOST_FEATURES:
        raise UserError(
            f"pruner.name=regression: {layer} reads {features:,} numbers for the channels of {group.name}, and the "
            f"products of their pairs take {8 * features**2 / 2**30:.1f} GiB, several times; leave them whole: "
            f"pruner.skip=[{group.name}]"
        )


def _select_units(group: ChannelGroup, width: int, samples: Sequence[ReaderSample]) -> list[int]:
    """Return the units to keep, by the sum of the errors of all readers."""
    gram, correlation = np.zeros((group.size, group.size)), np.zeros(group.size)
    for sample in samples:
        flat, whole = sample.weight.flatten(1), sample.whole
        units = sample.reader.units.repeat_interleave(sample.weight.shape[2])
        # Entry (a, b): inner product of what features a and b contribute to all outputs. Units sum their features.
        of_features = (flat.T @ flat).mul_(whole.xx)
        rows = of_features.new_zeros(group.size, len(units)).index_add_(0, units, of_features)
        gram += rows.new_zeros(group.size, group.size).index_add_(1, units, rows).cpu().numpy()
        aligned = (flat.T * whole.xy).sum(1)
        correlation += aligned.new_zeros(group.size).index_add_(0, units, aligned).cpu().numpy()
        if sample.intercept:
            # One intercept for all outputs, as where a library's LASSO gets them as one long list.
            sums = whole.x * flat.sum(0)
            total = sums.new_zeros(group.size).index_add_(0, units, sums).cpu().numpy()
            entries = max(1, whole.count * len(flat))
            gram -= np.outer(total, total) / entries
            correlation -= total * float(whole.y.sum()) / entries
    return select_by_lasso(gram, correlation, width)
