import pytest
import torch

from rethink_prune.data.shard import Shard


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 2, 5, 6, 13, 14, 64])
def test_weighted_means_of_all_processes_are_the_mean_of_the_batch(world: int, images: int) -> None:
    values = torch.randn(images, dtype=torch.float64, generator=torch.Generator().manual_seed(images))
    means, counted = [], 0.0
    for rank in range(world):
        shard = Shard(rank, world)
        part = values[shard.of_batch(0, images)]
        assert len(part) >= min(2, images)  # what batch normalisation needs
        means.append(shard.weight(len(part), images) * part.mean())
        counted += len(part) / shard.copies(images)
    assert torch.stack(means).mean().item() == pytest.approx(values.mean().item(), abs=1e-12)
    assert counted == pytest.approx(images)
