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
from rethink_prune.models import asked_options, build_model, takes_image_size
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser, initialiser
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.state import copied_state, full_state, load_full_state
from rethink_prune.study.plan import UNPRUNED
from rethink_prune.study.trial import check_output, check_state, try_training
from rethink_prune.surgery.architecture import Architecture, apply_masks, draw_masked
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.runtime import Runtime

_OWN_INITIALISER = (
    "give that module a reset_parameters() that draws it, or name a function that draws every weight of a network "
    "anew: model.init=path.to.module:function"
)


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
        """What ``build_model`` is told beside the numbers of classes and channels."""
        asked = asked_options(self.options.name, self.options.options)
        return {**_size_option(self.options.name, self.info), **asked, **self.options.args}

    def init_of(self, unpruned: nn.Module) -> str | None:
        """Return the name of the initialiser: as configured, or the family's; None where there is neither."""
        return self.options.init or family_initialiser(unpruned)

    def check(self, unpruned: nn.Module, runtime: Runtime, *, draws_anew: bool) -> Runtime:
        """Check the unpruned network before anything is trained.

        Parameters
        ----------
        unpruned : torch.nn.Module
            From `large`; in evaluation mode afterwards.
        runtime : Runtime
            How the study means to train.
        draws_anew : bool
            Whether some arm draws the weights of a pruned network anew.

        Returns
        -------
        Runtime
            With a memory format that the network takes.

        Raises
        ------
        UserError
            If the network takes no such images, gives no logits, cannot be trained, draws what no seed decides, or
            cannot be drawn anew.
        """
        where = f"model.name={self.options.name}"
        if draws_anew and self.init_of(unpruned) is None:
            _check_redrawn(unpruned, where)
        if self.is_own:
            check_state(unpruned, self.large(), where)
        check_output(unpruned, self.info, where)
        if not self.is_own:
            return runtime
        if draws_anew:
            self.scratch(UNPRUNED)
        return try_training(unpruned, self.info, runtime, where)

    @property
    def is_own(self) -> bool:
        """Whether network or initialiser are neither ours nor torchvision's, which are tested."""
        named = (self.options.name, self.options.init or "")
        return any(":" in name and not name.startswith("torchvision.models:") for name in named)

    def large(self) -> nn.Module:
        """Build the unpruned network with the weights that the stage ``large`` starts from.

        Raises
        ------
        UserError
            If it cannot be built, or ``model.init`` cannot draw its weights.
        """
        return self._build("large-init")

    def ticket(self, architecture: Architecture, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Build a pruned network with the unpruned one's weights where they remain.

        Parameters
        ----------
        architecture : Architecture
            Says which ones those are.
        weights : mapping of str to Tensor, optional
            A state dict of the unpruned network; by default, what it started from.
        """
        unpruned = self.large()
        if weights is not None:
            load_full_state(unpruned, weights)
        network = reshape(unpruned, architecture)
        apply_masks(network, architecture.masks)
        return network

    def scratch(self, architecture: Architecture, *, dense: bool = False) -> nn.Module:
        """Build a pruned network with every weight drawn anew, in its own widths.

        Parameters
        ----------
        architecture : Architecture
            Which channels remain does not matter.
        dense : bool
            Draw weights as in the unpruned network's widths.

        Raises
        ------
        UserError
            If a tensor that is drawn at random kept the values of the unpruned network.
        """
        unpruned, architecture = self.large(), architecture.without_positions()
        network = reshape(unpruned, architecture)
        before = copied_state(network)
        # Another stream than that of large: sharing it would be half a lottery ticket.
        with seeded(derive_seed(self.seed, "scratch-init")):
            drawn = unpruned if dense else network
            self._draw(drawn, self.init_of(unpruned) or "reset_parameters")
            network = reshape(unpruned, architecture) if dense else network
            draw_masked(network, architecture.masks, dense=dense)
        kept = [name for name, tensor in full_state(network).items() if torch.equal(tensor, before[name])]
        # Of these, what another seed gives other values was drawn; all else is a constant by design.
        other = full_state(reshape(self._build("other-init"), architecture)) if kept else {}
        shared = [name for name in kept if not torch.equal(before[name], other[name])]
        if shared:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            raise UserError(
                f"model.name={self.options.name}: scratch arms cannot draw {shared[0]}{more} anew: it would keep the "
                f"values of the unpruned network; {_OWN_INITIALISER}"
            )
        return network

    def _build(self, purpose: str) -> nn.Module:
        """Build the unpruned network with weights that a purpose of the seed decides."""
        options, seed = self.options, derive_seed(self.seed, purpose)
        initialiser(options.init or "reset_parameters")
        with seeded(seed):
            network = build_model(
                options.name, num_classes=self.info.num_classes, in_channels=self.info.channels, **self.build_options
            )
        init = self.init_of(network)
        if init is not None:
            # From the start of the stream again: what the constructor draws does not count.
            with seeded(seed):
                self._draw(network, init)
        return network

    def _draw(self, network: nn.Module, init: str) -> None:
        try:
            initialiser(init)(network)
        except ValueError as error:
            raise UserError(f"model.init={init}: {error}; give it one, or leave model.init out") from None
        except Exception as error:  # a user's initialiser may raise anything
            if init in INITIALISERS:
                raise
            raise UserError(f"model.init={init}: failed with {type(error).__name__}: {first_line(error)}") from error

    def load(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> nn.Module:
        """Build a network with these weights."""
        network = reshape(self.large(), architecture)
        load_full_state(network, weights)
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
            sizes = {"num_classes": info.num_classes, "in_channels": info.channels, **_size_option(name, info)}
            reference = build_model(name, **sizes)
    except UserError as error:
        raise UserError(str(error).replace("model.name", "budget.reference_model", 1)) from error
    return count_cost(reference, (info.channels, info.image_size, info.image_size)).macs


def _size_option(name: str, info: DatasetInfo) -> dict[str, int]:
    return {"image_size": info.image_size} if takes_image_size(name) else {}


def _check_redrawn(model: nn.Module, where: str) -> None:
    """Raise `UserError` if some module of a network of no known family cannot draw its weights anew."""
    try:
        INITIALISERS["reset_parameters"](on_meta(model))
    except ValueError as error:
        raise UserError(f"{where}: scratch arms cannot draw its weights anew: {error}; {_OWN_INITIALISER}") from None
