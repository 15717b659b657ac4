"""Networks as other people write them, in small: exact after surgery, with what stays whole said, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from rethink_prune.errors import UserError
from rethink_prune.finished.evaluate import evaluate_stage
from rethink_prune.store.stage import Stage
from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply
from rethink_prune.training.runtime import Runtime

Compare = Callable[..., tuple[Channels, nn.Module]]
IMAGE = (2, 3, 16, 16)


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([nn.SiLU()] if act else []))


class ChannelNorm(nn.Module):
    """LayerNorm over channels of N x C x H x W by hand (the ConvNeXt code)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.eps = 1e-6

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        mask = torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) + keep
        return x / keep * mask.floor()


class NextBlock(nn.Module):
    def __init__(self, c: int, p: float = 0.2) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(1e-1 * torch.ones(c))
        self.path = DropPath(p)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + self.path(y.permute(0, 3, 1, 2))


class ConvNext(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 2, 2), ChannelNorm(8))
        self.stages = nn.Sequential(NextBlock(8), ChannelNorm(8), nn.Conv2d(8, 12, 2, 2), NextBlock(12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean([-2, -1])))


class SE(nn.Module):
    def __init__(self, c: int, r: int = 4, act: Any = nn.Sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Conv2d(c, c // r, 1), nn.Conv2d(c // r, c, 1), act()

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.act(self.fc2(F.relu(self.fc1(s))))


class SELinear(nn.Module):
    def __init__(self, c: int, r: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(c, c // r), nn.ReLU(inplace=True), nn.Linear(c // r, c), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class MBConv(nn.Module):
    def __init__(self, i: int, o: int, s: int = 1, e: int = 4, se: Any = SE) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(i, i * e, 1), conv(i * e, i * e, 5, s, i * e), se(i * e), conv(i * e, o, 1, act=False)
        )
        self.path, self.same = DropPath(0.2), s == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + self.path(y) if self.same else y


class Efficient(nn.Module):
    se = SE

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(in_channels, 8, 3, 1),
            MBConv(8, 8, se=self.se),
            MBConv(8, 12, 2, se=self.se),
            MBConv(12, 12, se=self.se),
            conv(12, 32, 1),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class EfficientLinear(Efficient):
    se = SELinear


class ECA(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class EfficientECA(Efficient):
    se = ECA


class RegBlock(nn.Module):
    def __init__(self, i: int, o: int, s: int, g: int) -> None:
        super().__init__()
        self.a, self.b, self.se, self.c = conv(i, o, 1), conv(o, o, 3, s, o // g), SE(o), conv(o, o, 1, act=False)
        self.proj = conv(i, o, 1, s, act=False) if (i, s) != (o, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.se(self.b(self.a(x))))
        return F.relu(y + (x if self.proj is None else self.proj(x)))


class RegNet(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv(in_channels, 8), RegBlock(8, 16, 2, 4), RegBlock(16, 16, 1, 4), RegBlock(16, 24, 2, 8)
        )
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean((2, 3)))


class Ghost(nn.Module):
    def __init__(self, i: int, o: int, k: int = 1, act: bool = True) -> None:
        super().__init__()
        self.o, init = o, math.ceil(o / 2)
        self.primary, self.cheap = conv(i, init, k, act=act), conv(init, init, 3, 1, init, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], dim=1)[:, : self.o, :, :]


class GhostBlock(nn.Module):
    def __init__(self, i: int, m: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.a, self.b = Ghost(i, m), Ghost(m, o, act=False)
        self.dw = conv(m, m, 3, s, m, act=False) if s > 1 else nn.Identity()
        self.se = SE(m)
        self.short = (
            nn.Sequential()
            if (i, s) == (o, 1)
            else nn.Sequential(conv(i, i, 3, s, i, act=False), conv(i, o, 1, act=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.se(self.dw(self.a(x)))) + self.short(x)


class GhostNet(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv(in_channels, 8),
            GhostBlock(8, 13, 8),
            GhostBlock(8, 20, 12, 2),
            GhostBlock(12, 24, 12),
            conv(12, 24, 1),
        )
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.net(x), 1).flatten(1))


class Res2Block(nn.Module):
    def __init__(self, c: int, w: int = 4, scale: int = 4, stage: bool = False) -> None:
        super().__init__()
        self.w, self.scale, self.stage = w, scale, stage
        self.a, self.c = conv(c, w * scale, 1), conv(w * scale, c, 1, act=False)
        self.convs = nn.ModuleList(conv(w, w) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.a(x), self.w, 1)
        y, out = None, []
        for i, c in enumerate(self.convs):
            y = parts[i] if y is None or self.stage else y + parts[i]
            y = c(y)
            out.append(y)
        out.append(F.avg_pool2d(parts[-1], 3, 1, 1) if self.stage else parts[self.scale - 1])
        return F.relu(x + self.c(torch.cat(out, 1)))


class Res2Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(in_channels, 12), Res2Block(12, stage=True), Res2Block(12))
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean((2, 3)))


class SelecBlock(nn.Module):
    def __init__(self, i: int, skip: int, k: int, o: int, first: bool, s: int) -> None:
        super().__init__()
        self.first = first
        self.c1, self.c2, self.c3 = conv(i, k, 3, s), conv(k, k, 1), conv(k, k // 2)
        self.c4, self.c5 = conv(k // 2, k, 1), conv(k, k // 2)
        self.c6 = conv(2 * k + (0 if first else skip), o, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, list):
            x = [x]
        d1 = self.c1(x[0])
        d2 = self.c3(self.c2(d1))
        d3 = self.c5(self.c4(d2))
        if self.first:
            out = self.c6(torch.cat([d1, d2, d3], 1))
            return [out, out]
        return [self.c6(torch.cat([d1, d2, d3, x[1]], 1)), x[1]]


class SelecSLS(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = conv(in_channels, 8)
        self.features = nn.Sequential(
            SelecBlock(8, 0, 8, 12, True, 2), SelecBlock(12, 12, 8, 16, False, 1), SelecBlock(16, 12, 12, 16, False, 1)
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features([self.stem(x)])[0].mean((2, 3)))


class HRNet(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        w = self.w = (8, 12, 16)
        self.stem = conv(in_channels, w[0])
        self.down = nn.ModuleList([conv(w[0], w[1], 3, 2), conv(w[1], w[2], 3, 2)])
        self.branches = nn.ModuleList(nn.Sequential(conv(c, c), conv(c, c)) for c in w)
        self.fuse = nn.ModuleList()
        for i in range(3):
            row = nn.ModuleList()
            for j in range(3):
                if i == j:
                    row.append(nn.Identity())
                elif j > i:
                    row.append(
                        nn.Sequential(
                            conv(w[j], w[i], 1, act=False), nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")
                        )
                    )
                else:
                    row.append(
                        nn.Sequential(
                            *[
                                conv(w[j], w[i] if k == i - j - 1 else w[j], 3, 2, act=k != i - j - 1)
                                for k in range(i - j)
                            ]
                        )
                    )
            self.fuse.append(row)
        self.incre = nn.ModuleList(conv(c, 16, 1) for c in w)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        xs = [self.stem(x)]
        for d in self.down:
            xs.append(d(xs[-1]))
        xs = [b(x) for b, x in zip(self.branches, xs, strict=True)]
        out = []
        for i in range(3):
            y = self.fuse[i][0](xs[0])
            for j in range(1, 3):
                y = y + self.fuse[i][j](xs[j])
            out.append(F.relu(y))
        y = self.incre[0](out[0])
        for i in (1, 2):
            y = F.interpolate(y, size=out[i].shape[-2:], mode="bilinear", align_corners=False) + self.incre[i](out[i])
        return self.head(y.mean((2, 3)))


class DLATree(nn.Module):
    def __init__(
        self,
        levels: int,
        i: int,
        o: int,
        s: int = 1,
        root_dim: int = 0,
        level_root: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__()
        root_dim = root_dim or 2 * o
        if level_root:
            root_dim += i
        self.down = nn.MaxPool2d(s, s) if s > 1 else nn.Identity()
        self.project = conv(i, o, 1, act=False) if levels == 1 and i != o else nn.Identity()
        if levels == 1:
            self.a, self.b, self.root = conv(i, o, 3, s), conv(o, o), conv(root_dim, o, 1, act=False)
        else:
            self.a = DLATree(levels - 1, i, o, s, residual=residual)
            self.b = DLATree(levels - 1, o, o, root_dim=root_dim + o, residual=residual)
        self.levels, self.level_root, self.residual = levels, level_root, residual

    def forward(self, x: Tensor, children: Any = None) -> Tensor:
        children = [] if children is None else children
        bottom = self.down(x)
        short = self.project(bottom)
        if self.level_root:
            children.append(bottom)
        if self.levels > 1:
            x1 = self.a(x)
            children.append(x1)
            return self.b(x1, children)
        x1 = self.a(x) + short
        x2 = self.b(x1) + x1
        y = self.root(torch.cat([x2, x1, *children], 1))
        return F.relu(y + x2 if self.residual else y)


class DLA(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(in_channels, 8), DLATree(1, 8, 12, 2), DLATree(2, 12, 16, 2, level_root=True))
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.net(x), 1)).flatten(1)


class FPN(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        w = (8, 12, 16)
        self.c = nn.ModuleList([conv(in_channels, 8), conv(8, 12, 3, 2), conv(12, 16, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(i, 10, 1) for i in w)
        self.out = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in w)
        self.head = nn.Linear(30, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        xs = []
        for c in self.c:
            x = c(x)
            xs.append(self.lateral[len(xs)](x))
        for i in (1, 0):
            xs[i] = xs[i] + F.interpolate(xs[i + 1], size=xs[i].shape[-2:], mode="nearest")
        ys = [o(y) for o, y in zip(self.out, xs, strict=True)]
        return self.head(torch.cat([y.amax((2, 3)) for y in ys], 1))


class FPNWeighted(FPN):
    """BiFPN's fast normalised fusion with learnt weights."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.w = nn.Parameter(torch.ones(3))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.w)

    def forward(self, x: Tensor) -> Tensor:
        w = F.relu(self.w)
        w = w / (w.sum() + 1e-4)
        a = self.c[0](x)
        b = self.c[1](a)
        c = self.c[2](b)
        a, b, c = self.lateral[0](a), self.lateral[1](b), self.lateral[2](c)
        y = w[0] * F.max_pool2d(a, 4) + w[1] * F.max_pool2d(b, 2) + w[2] * c
        return self.head(torch.cat([o(F.silu(y)).mean((2, 3)) for o in self.out], 1))


class FPNShared(FPN):
    """One head for all levels, as in RetinaNet."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.tower = nn.Sequential(conv(10, 10), conv(10, 10))
        self.head = nn.Linear(10, num_classes)
        self.out = None

    def forward(self, x: Tensor) -> Tensor:
        xs = []
        for c in self.c:
            x = c(x)
            xs.append(self.lateral[len(xs)](x))
        for i in (1, 0):
            xs[i] = xs[i] + F.interpolate(xs[i + 1], scale_factor=2.0, mode="nearest")
        logits = [self.head(self.tower(y).mean((2, 3))) for y in xs]
        return torch.stack(logits).mean(0)


class YBottleneck(nn.Module):
    def __init__(self, c: int, add: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.add = conv(c, c), conv(c, c), add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x)) if self.add else self.b(self.a(x))


class C2f(nn.Module):
    def __init__(self, i: int, o: int, n: int = 2, add: bool = True) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = conv(i, 2 * self.c, 1), conv((2 + n) * self.c, o, 1)
        self.m = nn.ModuleList(YBottleneck(self.c, add) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x).chunk(2, 1)
        y = [y[0], y[1]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fSplit(C2f):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x).split((self.c, self.c), 1)
        y = [y[0], y[1]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.m = conv(c, c // 2, 1), conv(c * 2, c, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = [self.a(x)]
        x.extend(self.m(x[-1]) for _ in range(3))
        return self.b(torch.cat(x, 1))


class Focus(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = conv(4 * i, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1))


class CSP(nn.Module):
    """C3"""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(i, o // 2, 1), conv(i, o // 2, 1), conv(o, o, 1)
        self.m = nn.Sequential(YBottleneck(o // 2), YBottleneck(o // 2, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat((self.m(self.a(x)), self.b(x)), dim=1))


class PSA(nn.Module):
    """YOLOv10/11 attention block."""

    def __init__(self, c: int, heads: int = 2) -> None:
        super().__init__()
        self.c = c // 2
        self.heads, self.d = heads, self.c // heads
        self.cv1, self.cv2 = conv(c, c, 1), conv(c, c, 1)
        self.qkv, self.pe, self.proj = (
            conv(self.c, 3 * self.c, 1, act=False),
            conv(self.c, self.c, 3, 1, self.c, act=False),
            conv(self.c, self.c, 1, act=False),
        )

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, self.heads, 3 * self.d, h * w).split([self.d, self.d, self.d], dim=2)
        a = ((q.transpose(-2, -1) @ k) * self.d**-0.5).softmax(-1)
        x = (v @ a.transpose(-2, -1)).view(b, c, h, w) + self.pe(v.reshape(b, c, h, w))
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), 1)
        b = b + self.attend(b)
        return self.cv2(torch.cat((a, b), 1))


class Yolo(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Focus(in_channels, 8), C2f(8, 12), conv(12, 12, 3, 2), C2fSplit(12, 12, add=False), CSP(12, 16), SPPF(16)
        )
        self.head = nn.Sequential(
            conv(16, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0, True), nn.Linear(20, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class YoloAttention(Yolo):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.net.append(PSA(16))


class ASPPPool(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()

        def dil(r: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.convs = nn.ModuleList(
            [
                conv(i, o, 1),
                dil(2),
                dil(3),
                ASPPPool(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1, bias=False), nn.ReLU()),
            ]
        )
        self.project = nn.Sequential(conv(4 * o, o, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        res = []
        for c in self.convs:
            res.append(c(x))
        return self.project(torch.cat(res, dim=1))


class DeepLab(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.low, self.high = conv(in_channels, 8), nn.Sequential(conv(8, 12, 3, 2), conv(12, 16))
        self.aspp, self.project = ASPP(16, 12), conv(8, 6, 1)
        self.classifier = nn.Sequential(conv(18, 12), nn.Conv2d(12, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        y = F.interpolate(self.aspp(self.high(low)), size=low.shape[2:], mode="bilinear", align_corners=False)
        y = self.classifier(torch.cat([self.project(low), y], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False).mean((2, 3))


class DeepLabBoth(DeepLab):
    """Also an auxiliary map, as torchvision's: a dict with out and aux."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.aux = nn.Sequential(conv(8, 6), nn.Conv2d(6, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return {"out": super().forward(x), "aux": self.aux(self.low(x)).mean((2, 3))}


class UNet(nn.Module):
    transpose = False

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()

        def two(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
                nn.Conv2d(o, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )

        self.inc, self.d1, self.d2 = two(in_channels, 8), two(8, 12), two(12, 16)
        self.u1, self.u2 = (
            two(28, 12) if not self.transpose else two(24, 12),
            two(20, 8) if not self.transpose else two(16, 8),
        )
        self.t1, self.t2 = (
            (nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2))
            if self.transpose
            else (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),) * 2
        )
        self.outc = nn.Conv2d(8, num_classes, 1)

    def up(self, x: Tensor, skip: Tensor, t: nn.Module, c: nn.Module) -> Tensor:
        x = t(x)
        dy, dx = skip.size()[2] - x.size()[2], skip.size()[3] - x.size()[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return c(torch.cat([skip, x], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.d1(F.max_pool2d(a, 2))
        c = self.d2(F.max_pool2d(b, 2))
        y = self.up(self.up(c, b, self.t1, self.u1), a, self.t2, self.u2)
        return self.outc(y).mean((2, 3))


class UNetTranspose(UNet):
    transpose = True


class AttentionUNet(UNet):
    """Additive attention gates on the skips."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.wg, self.wx, self.psi = nn.Conv2d(16, 6, 1), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.d1(F.max_pool2d(a, 2))
        c = self.d2(F.max_pool2d(b, 2))
        g = F.interpolate(self.wg(c), scale_factor=2)
        b = b * torch.sigmoid(self.psi(F.relu(g + self.wx(b))))
        y = self.up(self.up(c, b, self.t1, self.u1), a, self.t2, self.u2)
        return self.outc(y).mean((2, 3))


class TimeBlock(nn.Module):
    norm = staticmethod(lambda c: nn.GroupNorm(4, c))
    film = False

    def __init__(self, i: int, o: int, t: int) -> None:
        super().__init__()
        self.n1, self.c1, self.n2, self.c2 = (
            self.norm(i),
            nn.Conv2d(i, o, 3, padding=1),
            self.norm(o),
            nn.Conv2d(o, o, 3, padding=1),
        )
        self.emb = nn.Linear(t, 2 * o if self.film else o)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x)))
        e = self.emb(F.silu(t))[:, :, None, None]
        if self.film:
            scale, shift = torch.chunk(e, 2, dim=1)
            h = self.n2(h) * (1 + scale) + shift
        else:
            h = self.n2(h + e)
        return self.skip(x) + self.c2(F.silu(h))


class FilmBlock(TimeBlock):
    norm, film = nn.BatchNorm2d, True


class SpatialAttention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(4, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).unbind(1)
        a = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * c**-0.5, -1)
        return x + self.out(torch.einsum("bij,bcj->bci", a, v).reshape(b, c, h, w))


class Diffusion(nn.Module):
    block = TimeBlock

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.register_buffer("freqs", torch.exp(-math.log(1e4) * torch.arange(4) / 4), persistent=False)
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.down, self.pool = self.block(8, 12, 16), nn.Conv2d(12, 12, 3, 2, 1)
        self.mid, self.att = self.block(12, 16, 16), SpatialAttention(16)
        self.up = self.block(16 + 12, 8, 16)
        self.out = nn.Conv2d(8, num_classes, 1)

    def embed(self, x: Tensor) -> Tensor:
        level = x.flatten(1).std(1, keepdim=True) * 1000
        args = level * self.freqs
        return self.time(torch.cat([args.cos(), args.sin()], -1))

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x)
        a = self.down(self.stem(x), t)
        b = self.att(self.mid(self.pool(a), t))
        y = self.up(torch.cat([F.interpolate(b, scale_factor=2, mode="nearest"), a], 1), t)
        return self.out(y).mean((2, 3))


class DiffusionFilm(Diffusion):
    block = FilmBlock


class NonLocal(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.i = c // 2
        self.g = nn.Sequential(nn.Conv2d(c, self.i, 1), nn.MaxPool2d(2))
        self.theta, self.phi = nn.Conv2d(c, self.i, 1), nn.Sequential(nn.Conv2d(c, self.i, 1), nn.MaxPool2d(2))
        self.w = nn.Sequential(nn.Conv2d(self.i, c, 1), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        g = self.g(x).view(b, self.i, -1).permute(0, 2, 1)
        theta = self.theta(x).view(b, self.i, -1).permute(0, 2, 1)
        f = F.softmax(torch.matmul(theta, self.phi(x).view(b, self.i, -1)), dim=-1)
        y = torch.matmul(f, g).permute(0, 2, 1).contiguous().view(b, self.i, x.size(2), x.size(3))
        return self.w(y) + x


class WithNonLocal(nn.Module):
    block = NonLocal

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.a, self.block1, self.b = conv(in_channels, 8), self.block(8), conv(8, 12, 3, 2)
        self.block2, self.head = self.block(12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.b(self.block1(self.a(x)))).mean((2, 3)))


class CBAM(nn.Module):
    def __init__(self, c: int, r: int = 4) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(c, c // r, 1, bias=False), nn.ReLU(), nn.Conv2d(c // r, c, 1, bias=False))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(pooled))


class BAM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Flatten(), nn.Linear(c, c // 4), nn.BatchNorm1d(c // 4), nn.ReLU(), nn.Linear(c // 4, c)
        )
        self.sp = nn.Sequential(conv(c, c // 4, 1), nn.Conv2d(c // 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        ch = self.fc(F.avg_pool2d(x, x.size(2), stride=x.size(2))).unsqueeze(2).unsqueeze(3).expand_as(x)
        att = 1 + torch.sigmoid(ch * self.sp(x).expand_as(x))
        return att * x


class SKBlock(nn.Module):
    """Selective kernels: a softmax between two branches."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(c, c), conv(c, c, 5), nn.Linear(c, 6)
        self.fcs = nn.ModuleList([nn.Linear(6, c), nn.Linear(6, c)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        z = self.fc((a + b).mean(-1).mean(-1))
        w = torch.softmax(torch.cat([f(z).unsqueeze(1) for f in self.fcs], 1), 1).unsqueeze(-1).unsqueeze(-1)
        return a * w[:, 0] + b * w[:, 1]


class WithCBAM(WithNonLocal):
    block = CBAM


class WithBAM(WithNonLocal):
    block = BAM


class WithSKBlock(WithNonLocal):
    block = SKBlock


class C2fAsPublished(C2f):
    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class YoloAsPublished(Yolo):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.net[1] = C2fAsPublished(8, 12)


class Encoder(nn.Module):
    """A transformer of torch's own layers, whose attention torch.fx takes as one operation."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, 12, 4, 4)
        layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


# How many groups there are with the scopes inner and all, and why the layers that stay whole do; nothing where only the
# network's last layer does.
NETWORKS: dict[Callable[..., nn.Module], tuple[int, int, set[str]]] = {
    ConvNext: (2, 2, {"mean over the channels", "normalised by LayerNorm"}),
    Efficient: (7, 9, set()),
    EfficientLinear: (7, 9, set()),
    EfficientECA: (1, 3, {"runs along another dimension", "unknown form of expand_as"}),
    RegNet: (7, 9, set()),
    GhostNet: (8, 10, set()),
    Res2Net: (10, 13, set()),
    SelecSLS: (19, 19, set()),
    HRNet: (7, 11, set()),
    DLA: (1, 3, set()),
    FPN: (6, 7, set()),
    FPNWeighted: (6, 7, set()),
    FPNShared: (5, 6, set()),
    Yolo: (21, 23, set()),
    YoloAsPublished: (21, 23, set()),
    YoloAttention: (23, 26, set()),
    DeepLab: (10, 10, set()),
    UNet: (10, 10, set()),
    UNetTranspose: (8, 8, {"unknown module ConvTranspose2d"}),
    AttentionUNet: (10, 11, {"one channel is broadcast over many"}),
    Encoder: (4, 4, {"normalised by LayerNorm"}),
    Diffusion: (2, 3, {"normalised by GroupNorm"}),
    DiffusionFilm: (4, 9, {"normalised by GroupNorm"}),
    WithNonLocal: (4, 6, set()),
    WithCBAM: (2, 2, {"mean over the channels", "one channel is broadcast over many"}),
    WithBAM: (4, 4, {"unknown form of expand_as"}),
    WithSKBlock: (4, 6, set()),
}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_pruned_equals_masked(network: Callable[..., nn.Module], scope: str, pruned_equals_masked: Compare) -> None:
    torch.manual_seed(0)
    channels, pruned = pruned_equals_masked(network(10), IMAGE, scope=scope)
    inner, every, reasons = NETWORKS[network]
    assert (len(channels.groups("inner")), len(channels.groups("all"))) == (inner, every)
    found = {reason.partition(": ")[2] or reason for reason in channels.frozen.values()}
    assert found - {"reads channels that stay whole", "network output"} == reasons
    assert pruned.train()(torch.randn(5, *IMAGE[1:], dtype=torch.float64)).shape == (5, 10)


def test_heads_that_only_training_runs_of_inception_are_cut() -> None:
    model = models.inception_v3(num_classes=10, init_weights=False)
    channels = analyse(model, torch.empty(1, 3, 299, 299))
    pruned, _ = apply(model, channels.plan({group.name: range(group.size // 2) for group in channels.groups("all")}))
    logits, auxiliary = pruned.train()(torch.randn(2, 3, 299, 299))
    assert logits.shape == auxiliary.shape == (2, 10)
    # Its auxiliary head takes no smaller images.
    with pytest.raises(UserError, match=r"Inception3: avg_pool2d_7: cannot take \(1, 768, 3, 3\)") as error:
        analyse(model, torch.empty(1, 3, 75, 75))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "network",
    [GhostNet, DeepLabBoth, DiffusionFilm, pytest.param(Encoder, marks=pytest.mark.slow)],
    ids=lambda network: network.__name__,
)
def test_a_study_of_it_has_one_result(
    network: type[nn.Module], small_study: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    factory: Callable[..., nn.Module] = network
    name = f"model.name={network.__module__}:{network.__name__}"
    options = ("dataset.image_size=16", "recipe.epochs=1", "pruner.ratio=0.5")
    runs = [small_study(name, *options, f"store.root={tmp_path / store}") for store in ("one", "two")]
    for arm, entry in runs[0]["arms"].items():
        first, second = (Path(run["arms"][arm]["stage"]) for run in runs)
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        overrides = ["dataset=digits", "dataset.image_size=16", "dataset.train_limit=200", "dataset.test_limit=100"]
        result = evaluate_stage(Stage(first), overrides, Runtime(torch.device("cpu"), "fp32"), factory)
        assert result["top1"] == pytest.approx(entry["top1"])
