"""Which part of every batch one process of a distributed training takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world` processes that share every batch; the default is the only process.

    Attributes
    ----------
    rank : int
        In [0, world).
    world : int
        Number of processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, start: int, stop: int) -> slice:
        """Return this process's part of the positions ``[start, stop)``; the parts of all processes make up the whole.

        Parts differ by one position at most, and can be empty.

        Examples
        --------
        >>> [Shard(rank, 3).of(0, 8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        count = stop - start
        return slice(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)
