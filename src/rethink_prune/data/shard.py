"""How a batch is divided among the processes of a distributed training."""

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

    def copies(self, images: int) -> int:
        """Return how many processes train on each image of a batch of so many: one, or all.

        Examples
        --------
        >>> Shard(0, 3).copies(6), Shard(0, 3).copies(5)
        (1, 3)
        """
        # Batch normalisation needs two images. A batch without two for every process (the last of an epoch) is not
        # shared: every process computes the whole of it.
        return 1 if images >= 2 * self.world else self.world

    def of_batch(self, start: int, stop: int) -> slice:
        """Return this process's part of a training batch at the positions ``[start, stop)`` of an epoch.

        Examples
        --------
        >>> Shard(1, 3).of_batch(0, 6), Shard(1, 3).of_batch(0, 5)
        (slice(2, 4, None), slice(0, 5, None))
        """
        return self.of(start, stop) if self.copies(stop - start) == 1 else slice(start, stop)

    def weight(self, part: int, images: int) -> float:
        """Return what the mean over this process's part of a training batch counts for.

        The mean over all processes of their weighted means is the mean over the batch.

        Parameters
        ----------
        part, images : int
            Images in this process's part, and in the batch.

        Examples
        --------
        >>> [Shard(rank, 2).weight(part, images=5) for rank, part in enumerate((2, 3))]
        [0.8, 1.2]
        """
        return part * self.world / (images * self.copies(images))


UNSHARED = Shard()
