"""The networks of a study: the unpruned one, and what an architecture leaves of it, with old or new weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rethink_prune.config import ModelConfig
from rethink_prune.cost import count_cost, on_meta
from rethink_prune.data import DatasetInfo
from rethink_prune.errors import UserError, first_line
from rethink_prune.models import asked_options, build_model
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.surgery.architecture import Architecture, draw_masked
from rethink_prune.surgery.cut import reshape


@dataclass(frozen=True)
class Networks:
    """Builds the networks of a study.

    Attributes
    ----------
    info : DatasetInfo
        Has the sizes of images and output.
    seed : int
        Decides the weights that are drawn.
    """

    options: ModelConfig
    info: DatasetInfo
    seed: int

    @cached_property
    def build_options(self) -> dict[str, Any]:
        """What ``build_model`` is told beside the sizes."""
        return {**asked_options(self.options.name, self.options.options), **self.options.args}

    def init_of(self, unpruned: nn.Module) -> str | None:
        """Return the name of the initialiser: as configured, or the family's; None where there is neither."""
        return self.options.init or family_initialiser(unpruned)

    def check(self, unpruned: nn.Module, *, draws_anew: bool) -> None:
        """Check the unpruned network before anything is trained.

        Parameters
        ----------
        unpruned : torch.nn.Module
            From `large`; in evaluation mode afterwards.
        draws_anew : bool
            Whether some arm draws the weights of a pruned network anew.

        Raises
        ------
        UserError
            If the network takes no such images, gives no logits, or cannot be drawn anew.
        """
        if draws_anew and self.init_of(unpruned) is None:
            _check_redrawn(unpruned, self.options.name)
        _check_output(unpruned, self.info, self.options.name)

    def large(self) -> nn.Module:
        """Build the unpruned network with the weights that the stage ``large`` starts from.

        Raises
        ------
        UserError
            If it cannot be built, or ``model.init`` cannot draw its weights.
        """
        options, seed = self.options, derive_seed(self.seed, "large-init")
        if options.init not in (None, *INITIALISERS):
            raise UserError(f"model.init={options.init}: no such initialiser; one of {', '.join(INITIALISERS)}")
        with seeded(seed):
            network = build_model(
                options.name, num_classes=self.info.num_classes, in_channels=self.info.channels, **self.build_options
            )
        init = self.init_of(network)
        if init is not None:
            try:
                # From the start of the stream again: what the constructor draws does not count.
                with seeded(seed):
                    INITIALISERS[init](network)
            except ValueError as error:
                raise UserError(f"model.init={init}: {error}; give it one, or leave model.init out") from None
        return network

    def scratch(self, architecture: Architecture) -> nn.Module:
        """Build a pruned network with every weight drawn anew, in its own widths."""
        unpruned = self.large()
        network = reshape(unpruned, architecture)
        # Another stream than that of large: sharing it would be half a lottery ticket.
        with seeded(derive_seed(self.seed, "scratch-init")):
            INITIALISERS[self.init_of(unpruned) or "reset_parameters"](network)
            draw_masked(network, architecture.masks)
        return network

    def load(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> nn.Module:
        """Build a network with these weights."""
        network = reshape(self.large(), architecture)
        network.load_state_dict(weights)
        return network


def reference_macs(name: str, info: DatasetInfo) -> int:
    """Return the MACs per image of ``budget.reference_model``.

    Raises
    ------
    UserError
        If there is no such network.
    """
    try:
        with torch.device("meta"):
            reference = build_model(name, num_classes=info.num_classes, in_channels=info.channels)
    except UserError as error:
        raise UserError(str(error).replace("model.name", "budget.reference_model", 1)) from error
    return count_cost(reference, (info.channels, info.image_size, info.image_size)).macs


def _check_redrawn(model: nn.Module, name: str) -> None:
    """Raise `UserError` if some module of a network of no known family cannot draw its weights anew."""
    try:
        INITIALISERS["reset_parameters"](on_meta(model))
    except ValueError as error:
        raise UserError(
            f"model.name={name}: scratch arms cannot draw its weights anew: {error}; "
            f"give that module a reset_parameters(), or name an initialiser with model.init"
        ) from None


def _check_output(model: nn.Module, info: DatasetInfo, name: str) -> None:
    """Raise `UserError` unless a network takes one image and gives its logits."""
    where = f"model.name={name}"
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, info.channels, info.image_size, info.image_size))
    except Exception as error:  # a user's forward may raise anything
        size = f"{info.channels} x {info.image_size} x {info.image_size}"
        raise UserError(
            f"{where}: fails on images of {size} (dataset.channels, dataset.image_size): {first_line(error)}"
        ) from error
    if not (isinstance(output, Tensor) and output.shape == (1, info.num_classes)):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"{where}: must give logits of 1 x {info.num_classes} for one image; gave {shape}")
