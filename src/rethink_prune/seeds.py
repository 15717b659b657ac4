"""Every random draw of a study comes from ``hash(seed, purpose, indices)``.

No draw depends on what ran before it, so arms are paired, stages can be reused, and a resumed run needs no saved
generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed that is a function of its arguments alone.

    Parameters
    ----------
    seed : int
        The study's seed.
    purpose : str
        What is drawn, e.g. ``"order"``; different purposes give unrelated streams.
    *indices : int
        Anything further that separates draws, e.g. the epoch.
    """
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with torch's global CPU generator at `seed`, and put the generator back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
