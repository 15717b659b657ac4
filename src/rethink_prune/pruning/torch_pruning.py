"""Scores of Torch-Pruning (Fang et al. 2023, *DepGraph: Towards Any Structural Pruning*, CVPR, arXiv:2301.12900).

``importance=NAME`` is any class of ``torch_pruning.pruner.importance``, made with the keyword arguments
``importance_args``. It scores the channels of a group's first layer, together with all that Torch-Pruning's own graph
ties to them; a unit of several channels (grouped convolutions) scores their sum. Only the scores are Torch-Pruning's:
which channels may go, how many, the cut, scopes, targets and rounds are those of every pruner here, so that costs stay
equal. Their normalisation divides by the mean of each group, so ``ranking=global`` may compare them.

An importance finds in the network what some of them need, taken from the first `images` training images in
evaluation mode: the gradients of the loss, summed over batches (`TaylorImportance`); the activations
(`ActivationImportance`, which keeps those of the last batch); or the gradients image by image (`HessianImportance`:
version 1.6.1 keeps those of the last image alone). Their own random numbers are drawn from the seed. `OBDCImportance`
needs the hooks of Torch-Pruning's own pruner, and is refused. Heads of attention are left whole: Torch-Pruning has to
be told of them. Its graph fails with ``scope=all`` where shortcuts pad channels, as in ``resnet20``.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.errors import UserError, first_line, suggestion
from rethink_prune.pruning.channel_pruner import ChannelPruner, ChannelTarget, Groups, Scores
from rethink_prune.pruning.gradients import copy_for_gradients, losses_of_batches
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.pruning.samples import FirstImages
from rethink_prune.surgery.channels import ChannelGroup

# They are written for Torch-Pruning's own pruner.
_REFUSED = {"OBDCImportance"}


class TorchPruningOptions(ChannelOptions):
    """How many channels go, by which importance, and how many training images it may look at."""

    importance: str = "MagnitudeImportance"
    importance_args: dict[str, int | float | bool | str | None] | None = None
    images: Count = 1000


class TorchPruning(ChannelPruner[TorchPruningOptions]):
    """Scores channels by an importance of Torch-Pruning.

    :source: Fang et al. 2023
    :goes: channels
    :by: any importance of Torch-Pruning (`pip install "rethink-prune[torch-pruning]"`)
    """

    name = "torch_pruning"
    options_type = TorchPruningOptions
    needs_data = True
    meant_for = "channels of convolutions and hidden units"

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> ChannelTarget:
        """Check the importance before anything is trained, and find the groups that may be pruned."""
        _try_arguments(self.options.importance, self.options.importance_args)
        return super().target(model, example, network)

    def may_touch(self, group: ChannelGroup) -> bool:
        """Leave heads of attention whole as well."""
        return group.kind != "heads" and super().may_touch(group)

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the importance of every unit, in float64."""
        name, arguments = self.options.importance, self.options.importance_args
        importance = make_importance(name, arguments)
        images = FirstImages(data, self.options.images)
        copy = copy_for_gradients(model, images.device)
        _leave_traces(copy, images, importance)
        graph = _dependencies(copy, images)
        scores = {}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            for group in groups:
                layer = group.layers[0]
                try:
                    values = _score(importance, graph, copy.get_submodule(layer))
                except ValueError as error:
                    instead = "" if self.options.scope == "inner" else ", or pruner.scope=inner"
                    raise UserError(
                        f"pruner.importance={name}: Torch-Pruning has no scores for {layer} ({error}); "
                        f"try another importance{instead}"
                    ) from error
                scores[group.name] = torch.stack([values[list(unit[layer])].sum() for unit in group.units])
        return scores

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Check the images, score, choose and cut."""
        FirstImages(data, self.options.images, target.input_shape)
        return super().prune(model, target, data=data, generator=generator)


def make_importance(name: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return an importance of Torch-Pruning.

    Parameters
    ----------
    name : str
        Of a class in ``torch_pruning.pruner.importance``.
    arguments : mapping, optional
        Its keyword arguments.

    Raises
    ------
    UserError
        If the package is missing, there is no such importance, it cannot be used here, or takes other arguments.

    Examples
    --------
    >>> make_importance("MagnitudeImportance", {"p": 1}).p
    1
    """
    module = _package().pruner.importance
    known = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, module.Importance) and not inspect.isabstract(value)
    }
    if name in _REFUSED:
        raise UserError(f"pruner.importance={name}: needs hooks of Torch-Pruning's own pruner, so it is not for here")
    if name not in known:
        names = suggestion(name, sorted(known.keys() - _REFUSED))
        raise UserError(f"pruner.importance={name}: Torch-Pruning has no such importance; {names}")
    try:
        return known[name](**(arguments or {}))
    except (TypeError, AssertionError):
        taken = ", ".join(inspect.signature(known[name]).parameters) or "none"
        raise UserError(f"pruner.importance_args={arguments}: {name} takes {taken}") from None


def _try_arguments(name: str, arguments: Mapping[str, Any] | None) -> None:
    """Score a small network: wrong values of arguments are noticed only then."""
    importance = make_importance(name, arguments)
    if not arguments:
        return
    images = FirstImages([(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))], 2)
    with torch.random.fork_rng(devices=()):
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 2)
        copy = copy_for_gradients(nn.Sequential(*layers), images.device)
        _leave_traces(copy, images, importance)
        try:
            _score(importance, _dependencies(copy, images), copy.get_submodule("0"))
        except ValueError as error:
            raise UserError(f"pruner.importance_args={arguments}: {name} cannot score with them ({error})") from error


def _dependencies(copy: nn.Module, images: FirstImages) -> Any:
    """Return Torch-Pruning's graph of a network."""
    example = next(iter(images))[:1].to(next(copy.parameters()))
    return _package().DependencyGraph().build_dependency(copy, example_inputs=example)


def _score(importance: Any, graph: Any, layer: nn.Module) -> torch.Tensor:
    """Return the importance of a layer's outputs, float64; a `ValueError` says why there is none."""
    prune_outputs = graph.get_pruner_of_module(layer).prune_out_channels
    channels = list(range(graph.get_out_channels(layer)))
    try:
        values = importance(graph.get_pruning_group(layer, prune_outputs, channels))
    except Exception as error:  # importances raise what they run into
        raise ValueError(first_line(error) or type(error).__name__) from error
    if values is None:
        raise ValueError("it finds nothing to score by")
    scores: torch.Tensor = values.detach().double().cpu()
    return scores


def _package() -> ModuleType:
    """Import Torch-Pruning: late, for it takes seconds."""
    try:
        import torch_pruning
    except ModuleNotFoundError:
        install = 'pip install "rethink-prune[torch-pruning]"'
        raise UserError(f"pruner.name=torch_pruning: needs torch-pruning; install it with {install}") from None
    return torch_pruning


def _leave_traces(copy: nn.Module, images: FirstImages, importance: Any) -> None:
    """Leave gradients and activations of the images where an importance looks for them."""
    by_image = hasattr(importance, "accumulate_grad")
    if by_image:
        batches = images.labelled()
        pairs = [pair for pixels, labels in batches for pair in zip(pixels.split(1), labels.split(1), strict=True)]
        images = FirstImages(pairs, len(pairs))
    with importance.compute_importance(copy) if hasattr(importance, "compute_importance") else nullcontext():
        for loss, _ in losses_of_batches(copy, images):
            if by_image:
                copy.zero_grad()
            loss.backward()
            if by_image:
                importance.accumulate_grad(copy)
