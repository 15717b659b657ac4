"""Random numbers: every draw of a study comes from ``hash(seed, purpose, indices)``.

No draw depends on what ran before it. So arms see the same images in the same order, stages can be reused, and a
resumed run needs no saved generator state.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a seed in ``[0, 2**63)`` that depends on the arguments alone.

    Parameters
    ----------
    seed : int
        The study's seed.
    purpose : str
        What is drawn, e.g. ``"order"``; different purposes give unrelated numbers.
    *indices : int
        Anything further that separates draws, e.g. the epoch.

    Examples
    --------
    >>> derive_seed(0, "order", 1)
    4489457307835839548
    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 2)
    False
    """
    text = "/".join([str(seed), purpose, *map(str, indices)])
    # Python's own hash() differs from process to process. Torch takes signed 64-bit seeds: one bit fewer.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive_seed`.

    Examples
    --------
    >>> torch.randperm(5, generator=derive_generator(0, "order", 1))
    tensor([0, 1, 3, 2, 4])
    """
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (on the CPU), NumPy and Python, which code of users may draw from.

    Examples
    --------
    >>> seed_generators(0)
    >>> first = torch.rand(1).item(), np.random.rand(), random.random()
    >>> seed_generators(0)
    >>> (torch.rand(1).item(), np.random.rand(), random.random()) == first
    True
    """
    # Not torch.manual_seed, which would seed every device of the machine.
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with the generators of `seed_generators` at `seed`, and restore them afterwards.

    Examples
    --------
    >>> with seeded(0):
    ...     first = torch.rand(2)
    >>> with seeded(0):
    ...     print(torch.equal(torch.rand(2), first))
    True
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            seed_generators(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
