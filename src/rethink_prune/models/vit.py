"""Vision transformers (Dosovitskiy et al. 2020, arXiv:2010.11929) for small images, in the names and form of timm.

The widths are those of DeiT (Touvron et al. 2020, arXiv:2012.12877). A state dict of timm's ``VisionTransformer`` of
the same size fits, and the other way round.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.models.blocks import Mlp, drop_paths

_NORM_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Cut images into square patches, and let a convolution make a token of each.

    Parameters
    ----------
    patch_size : int
        Height and width of a patch, in pixels.
    dim : int
        Features of a token.
    """

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens, N x patches x `dim`."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017, arXiv:1706.03762).

    One layer computes all queries, then all keys, then all values. The number of heads follows from its width, so a
    network that lost heads runs the same code.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the new tokens, N x T x `dim`."""
        images, tokens, _ = x.shape
        # Each N x heads x T x head_dim.
        q, k, v = self.qkv(x).reshape(images, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(images, tokens, -1))


class TransformerBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a shortcut.

    Parameters
    ----------
    dim, heads : int
        Features of a token, and heads that share them.
    hidden : int
        Hidden units of the MLP.
    drop_path : nn.Module
        Follows both branches; see `drop_paths`.
    """

    def __init__(self, dim: int, heads: int, hidden: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = Mlp(nn.Linear(dim, hidden), nn.Linear(hidden, dim))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the new tokens, N x T x `dim`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patches and a class token, through blocks of attention; the class token is classified.

    Takes N x `in_channels` x `image_size` x `image_size`, gives N x `num_classes`.

    Parameters
    ----------
    image_size : int
        Height and width of the images, in pixels. A study takes it from its data set.
    patch_size : int
        Height and width of a patch, in pixels.
    dim : int
        Features of a token.
    depth : int
        Blocks.
    heads : int
        Heads of attention in each block; they share `dim` evenly.
    mlp_ratio : float
        Hidden units of an MLP for each feature.
    drop_path : float
        Stochastic depth in the last block; see `drop_paths`.

    Examples
    --------
    >>> VisionTransformer(dim=8, depth=1, heads=2, num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    initialiser = "timm_vit"

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        for option, value in (("patch_size", patch_size), ("dim", dim), ("depth", depth), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{option}={value}: must be at least 1")
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size}: must divide the size of the images, {image_size}")
        if dim % heads:
            raise ValueError(f"heads={heads}: must divide dim={dim}")
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio}: must leave at least one hidden unit")
        patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.patch_embed = PatchEmbedding(in_channels, patch_size, dim)
        drops = drop_paths(drop_path, depth)
        self.blocks = nn.Sequential(*[TransformerBlock(dim, heads, hidden, drop) for drop in drops])
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token and the position embedding, which no layer owns, as timm does."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, N x `num_classes`."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


NETWORKS = {"vit_tiny": VisionTransformer, "vit_small": partial(VisionTransformer, dim=384, heads=6)}
