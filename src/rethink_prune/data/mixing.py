"""Mixup and CutMix: images of a batch are blended, or get a box, with the ones before them, and so are their labels.

Zhang et al. 2018 (arXiv:1710.09412), Yun et al. 2019 (arXiv:1905.04899); the transforms are torchvision's. With a share
``s`` from ``Beta(alpha, alpha)``, Mixup makes ``s * image + (1 - s) * other`` of an image and its partner. CutMix puts
a box of the share ``1 - s`` of the other image into the image. Labels become shares of classes.

The draws belong to a batch of all processes together, and the partner of an image is the one before it there (of the
first, the last). So they depend neither on how many processes share the batch nor on what ran before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from rethink_prune.data.normalization import Batch
from rethink_prune.seeds import derive_seed, seeded


@dataclass(frozen=True)
class Mixing:
    """Mixes batches; where both ways are on, each batch takes one of them, with equal chances.

    Attributes
    ----------
    mixup, cutmix : float
        Alpha of the Beta distribution of the shares; 0: not this one.
    classes : int
        Number of classes.
    seed : int
        The study's seed.

    Examples
    --------
    >>> mixing = Mixing(mixup=0.8, cutmix=0.0, classes=2, seed=0)
    >>> images = torch.zeros(4, 1, 2, 2)
    >>> images[1:] = 1.0
    >>> mixed, shares = mixing(images, torch.tensor([0, 1, 1, 1]), epoch=0, start=0)  # the first one is the partner
    >>> torch.equal(mixed[:, 0, 0, 0], shares[:, 1]), shares.sum(1).tolist()
    (True, [1.0, 1.0, 1.0])
    """

    mixup: float
    cutmix: float
    classes: int
    seed: int

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, epoch: int, start: int) -> Batch:
        """Return the images but the first, each mixed with the one before it, and the shares of their classes.

        Parameters
        ----------
        images : torch.Tensor
            float32, 1 + B x C x H x W: B images that follow each other in a batch, and before them the partner of the
            first.
        labels : torch.Tensor
            int64, 1 + B: class numbers.
        epoch, start : int
            Which draws: those of the batch that starts at this position of the epoch.

        Returns
        -------
        tuple of torch.Tensor
            float32: B x C x H x W, and B x classes.
        """
        # torchvision draws from the global generators, on the CPU.
        with seeded(derive_seed(self.seed, "mixing", epoch, start)):
            images, labels = self._transform(images, labels)
        # The first one was mixed with the last, which may not be its partner.
        return images[1:], labels[1:]

    @cached_property
    def _transform(self) -> Callable[[torch.Tensor, torch.Tensor], Batch]:
        from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice  # slow to import

        alphas = ((MixUp, self.mixup), (CutMix, self.cutmix))
        ways = [way(alpha=alpha, num_classes=self.classes) for way, alpha in alphas if alpha]
        return RandomChoice(ways) if len(ways) > 1 else ways[0]
