"""What tests share: running studies, in their own process or through the command line, and networks to compare."""

from __future__ import annotations

import copy
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from rethink_prune.config import StudyConfig
from rethink_prune.files import conf_dir
from rethink_prune.study.prepare import check_config, prepare_study
from rethink_prune.surgery.architecture import named_tensors
from rethink_prune.surgery.channels import Channels

# Digits at their own size, a few hundred of them, a few epochs: a study of four stages in about two seconds.
SMALL = (
    "dataset.image_size=8",
    "dataset.train_limit=200",
    "dataset.test_limit=100",
    "recipe.epochs=2",
    "recipe.finetune.epochs=1",
    "precision=fp32",
    "device=cpu",
)


def configure(*overrides: str) -> StudyConfig:
    """Compose and validate as the command line does."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        tree = compose("config", overrides=list(overrides))
    return check_config(OmegaConf.to_container(tree, resolve=True))  # type: ignore[arg-type]


def plan_of(config: StudyConfig) -> dict[str, Any]:
    """Return the content of ``plan.json``."""
    _, _, content = prepare_study(config).full_plan()
    return content


def command(
    *arguments: str, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m rethink_prune`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "rethink_prune", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Net(nn.Module):
    """Layers by name and a forward pass given as a function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self._function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(self, x)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that no channel shares: float64, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = (1 / max(1, parameter[0].numel())) ** 0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.affine:
                    module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 2)
                    module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def mask(model: nn.Module, channels: Channels, drop: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of `model` at full width in which the dropped channels are zero wherever they appear.

    In evaluation mode it computes what the pruned network computes: the definition of pruning a channel, and
    the reference that tests compare surgery with.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    channels : Channels
        The analysis of `model`.
    drop : mapping of str to iterable of int
        Group name to indexes into its units.

    Examples
    --------
    >>> from rethink_prune.surgery.channels import analyse
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> masked = mask(model, analyse(model, torch.zeros(1, 2)), {"0": [0, 2]})
    >>> masked[0].weight.any(dim=1)
    tensor([False,  True, False])
    """
    masked = copy.deepcopy(model)
    plan = channels.plan(drop)
    with torch.no_grad():
        for name, kept in plan.outputs.items():
            module = masked.get_submodule(name)
            # Scale and shift of a batch norm, both: with the shift left, a masked channel would be a constant.
            tensors = [t for t in (module.weight, getattr(module, "bias", None)) if isinstance(t, torch.Tensor)]
            # A norm without scale and shift gives zero for a zero channel only if its mean is zero.
            tensors = tensors or [t for t in (module.running_mean,) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                tensor[_dropped_positions(kept, len(tensor))] = 0
        tensors = named_tensors(masked)
        for name, dims in plan.parameters.items():  # no layer has them
            dim, kept = next(iter(dims.items()))
            tensors[name].index_fill_(dim, torch.tensor(_dropped_positions(kept, tensors[name].shape[dim])), 0)
        for name in plan.selections.keys() & plan.inputs.keys():
            # Others read the whole stream; this layer's weights for what it does not select are zero.
            weight = masked.get_parameter(f"{name}.weight")
            weight[:, _dropped_positions(plan.inputs[name], weight.shape[1])] = 0
    return masked


def _dropped_positions(kept: Iterable[int], size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept))


class FakeRecorder:
    """Stands for a `CudaRecorder`: keeps work, and does it in each replay, on the recording's tensors, into its own."""

    def __init__(self, *, random: bool = False, fails: str | None = None) -> None:
        self.draws = random
        self.fails = fails
        self.recorded = self.replayed = self.warmed = 0
        self._made: Any = ()

    def warm_up(self, work: Callable[[], Any]) -> Any:
        self.warmed += 1
        self._made = work()
        return self._made

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError(self.fails)
        self.recorded += 1
        # A recording computes nothing: that of the warm-up tells the shapes.
        outputs = tree_map(torch.zeros_like, self._made)

        def launch() -> None:
            self.replayed += 1
            tree_map(lambda kept, new: kept.copy_(new), outputs, work())

        return launch, outputs


def run_forked(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], *, preload: Sequence[str], timeout: float
) -> tuple[int, str]:
    """Run ``python -m`` with `words`, in a process forked from one that has imported `preload`; see `command`.

    Importing the libraries takes longer than a small study does, so tests of many commands import them once. The first
    call decides what is imported.

    Returns
    -------
    tuple of int and str
        The exit status, and what was printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        process = context.Process(target=_run_module, args=(words, folder, dict(environment), output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        status = process.exitcode
        assert status is not None
        return status, output.read_text() if output.exists() else ""


def _run_module(words: Sequence[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    os.environ.update(environment)
    # As `python -m` does, before the module is run: its folder comes first.
    sys.path.insert(0, str(folder))
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
