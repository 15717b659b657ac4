"""FastNAS of NVIDIA's Model Optimizer as a pruner: it searches the widths, and sorts the channels by their norms.

It needs ``pip install "rethink-prune[neighbours]"``, and runs on a CPU.
"""

import modelopt.torch.prune as mtp
import torch
from torch import nn

from rethink_prune import count_cost
from rethink_prune.config import ChannelOptions, Count
from rethink_prune.copying import copy_network
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget, Channelwise, Choice
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.pruning.samples import FirstImages

# Its own steps of 5 %, but any number of channels: its default is multiples of 32, and ResNet-20 has layers of 16.
SHARES = tuple(step / 20 for step in range(1, 21))
RULES = {
    "nn.Conv2d": {"*": {"channels_ratio": SHARES, "channel_divisor": 1}},
    "nn.BatchNorm2d": {"*": {"features_ratio": SHARES, "feature_divisor": 1}},
    "nn.Linear": {"*": {"features_ratio": SHARES, "feature_divisor": 1}},
}


class FastNASOptions(ChannelOptions):
    """The MACs to stay below, and how many training images tell the accuracy of a candidate."""

    images: Count = 400


class FastNAS(Channelwise[FastNASOptions]):
    """Takes the widths and channels that FastNAS finds below ``pruner.target_macs``, a share of the unpruned MACs."""

    options_type = FastNASOptions
    needs_data = True

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Search on a copy, then cut the same channels here."""
        found = self._search(copy_network(model).eval(), target, FirstImages(data, self.options.images))
        drop = {}
        for group in target.groups:
            # A batch norm's scales are numbers that no two channels share: they tell which channels are left.
            norm, places = next(iter(group.norms.items()))
            scales = model.get_parameter(f"{norm}.weight").tolist()
            left = set(found.get_parameter(f"{norm}.weight").tolist())
            drop[group.name] = [unit for unit, (place, *_) in enumerate(places) if scales[place] not in left]
        result = target.cut(model, Choice(drop))
        if count_cost(result.model, target.input_shape) != count_cost(found, target.input_shape):
            raise UserError("fastnas: its network could not be made from the one that it searched")
        return result

    def _search(self, network: nn.Module, target: ChannelTarget, images: FirstImages) -> nn.Module:
        batches = list(images.labelled())
        total = sum(len(labels) for _, labels in batches)
        # It estimates statistics of batch norms anew for every candidate, but not from fewer than 50 batches.
        pieces = torch.cat([pixels for pixels, _ in batches]).tensor_split(50)

        @torch.no_grad()
        def accuracy(candidate: nn.Module) -> float:
            return sum(int((candidate(pixels).argmax(1) == labels).sum()) for pixels, labels in batches) / total

        found, _ = mtp.prune(
            network,
            [("fastnas", RULES)],
            {"flops": f"{100 * self.options.target_macs}%"},
            dummy_input=torch.zeros(1, *target.input_shape),
            config={"score_func": accuracy, "data_loader": pieces, "collect_func": lambda piece: piece},
        )
        return found
