"""What needs one process only; tests/studies/test_distributed.py starts several."""

import pytest
import torch
from torch import nn

from harness import configure
from rethink_prune.errors import UserError
from rethink_prune.study.prepare import prepare_study
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.runtime import _device_of, prepare_runtime

CUDA = torch.device("cuda")


class OwnNorm(nn.BatchNorm2d):
    """Does more than batch normalisation, like those of timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_batch_norms_are_synchronised_on_cuda_only_and_keep_their_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), OwnNorm(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model[1][0].weight
    ALONE.share_norms(model, CUDA)
    Processes(world=2).share_norms(model, torch.device("cpu"))
    assert type(model[1][0]) is nn.BatchNorm2d
    Processes(world=2).share_norms(model, CUDA)
    assert type(model[1][0]) is nn.SyncBatchNorm
    assert model[1][0].weight is weight
    assert type(model[2]) is OwnNorm
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_batch_that_is_too_small_for_all_processes_is_refused() -> None:
    config = configure("recipe.batch_size=8", "device=cpu")
    with pytest.raises(UserError) as error:
        prepare_study(config, Processes(world=5, local_world=5))
    assert str(error.value) == (
        "recipe.batch_size=8: too few for 5 processes, which need two images each; start at most 4"
    )


def test_slimming_penalises_the_same_scales_when_norms_are_synchronised() -> None:
    study = prepare_study(
        configure("dataset=cifar10", "model=vgg16", "model.head=mlp", "pruner=slimming", "device=cpu")
    )
    model, other = study.networks.large(), study.networks.large()
    Processes(world=2).share_norms(other, CUDA)
    kinds = {type(module) for module in model.modules()}
    assert {nn.BatchNorm1d, nn.BatchNorm2d} <= kinds
    grads = []
    for network in (model, other):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        study.pruner.sparse(study.target).before_step(network, 0.1)
        grads.append({name for name, parameter in network.named_parameters() if parameter.grad.any()})
    assert grads[0] == grads[1] != set()


def test_every_process_has_a_cuda_device_of_its_own() -> None:
    second = Processes(rank=5, world=8, local_rank=1, local_world=4)
    assert _device_of(second, "auto", 4) == torch.device("cuda:1")
    assert _device_of(second, "cuda", 4) == torch.device("cuda:1")
    with pytest.raises(UserError) as error:
        _device_of(second, "cuda:2", 4)
    assert str(error.value) == (
        "device=cuda:2: torchrun started 4 processes on this machine, each of which needs a device of its own; "
        "use device=auto"
    )
    with pytest.raises(UserError) as error:
        _device_of(second, "auto", 2)
    assert str(error.value) == (
        "device=auto: torchrun started 4 processes on this machine, which has 2 CUDA devices; use --nproc-per-node=2"
    )
    # One process on each of several machines may name its device.
    assert _device_of(Processes(rank=1, world=2, machine=1), "cuda:1", 2) == torch.device("cuda:1")
    assert prepare_runtime("cpu", processes=second).device == torch.device("cpu")


def test_one_process_alone_sends_nothing() -> None:
    values = torch.ones(2)
    assert ALONE.sum(values) is values
    assert ALONE.max(3, 0) == [3, 0]
    assert ALONE.broadcast("x") == "x"
    assert ALONE.wrap(model := nn.Linear(1, 1), torch.device("cpu"), static=True) is model


def test_errors_of_the_body_are_not_taken_for_lost_processes() -> None:
    two = Processes(world=2)
    with pytest.raises(RuntimeError, match="shapes"), two.translate_connection_errors():
        raise RuntimeError("shapes do not fit")
    with (
        pytest.raises(UserError, match="process 0 of 2: another process of this training is gone"),
        two.translate_connection_errors(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
