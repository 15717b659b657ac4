"""Write the table of torchvision's and timm's networks in ``tests/README.md``: what can go, and whether it is exact.

PYTHONPATH=tests python tests/surgery/prunable_networks.py            # all of them: about an hour on two cores
PYTHONPATH=tests python tests/surgery/prunable_networks.py resnet18   # prints rows, writes nothing

Each network has random weights in float64, so that masks show. Every second unit of each group goes, the network is
rebuilt from its architecture, and both are compared with the network in which these units are zero.
"""

import gc
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from harness import mask
from rethink_prune.cost import count_cost, on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply, reshape

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- networks: tests/surgery/prunable_networks.py writes it -->\n", "<!-- end of the networks -->\n"
COLUMNS = ("network", "pixels", "followed by", "groups", "of heads", "MACs that can go, %", "difference")
# Larger networks are analysed by shapes alone.
MOST_PARAMETERS = 160_000_000
# One of each family.
TIMM = [
    "beit_base_patch16_224",
    "botnet26t_256",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_0_rw_224",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "convnextv2_atto",
    "crossvit_tiny_240",
    "cspresnet50",
    "darknet53",
    "davit_tiny",
    "deit3_small_patch16_224",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dpn68",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_dw",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "fbnetc_100",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gernet_s",
    "ghostnet_100",
    "gmlp_ti16_224",
    "hgnet_tiny",
    "hiera_tiny_224",
    "hrnet_w18_small_v2",
    "inception_next_atto",
    "inception_v4",
    "lcnet_050",
    "levit_128s",
    "mambaout_femto",
    "maxvit_tiny_tf_224",
    "mixer_s16_224",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "nfnet_l0",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_26w_4s",
    "resmlp_12_224",
    "resnest14d",
    "resnet18",
    "resnetv2_50",
    "rexnet_100",
    "selecsls42b",
    "seresnet18",
    "shvit_s1",
    "skresnet18",
    "starnet_s1",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tinynet_a",
    "tnt_s_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "vit_small_patch14_dinov2",
    "vit_tiny_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41",
    "xcit_nano_12_p16_224",
]


def networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Return how to build each network, and the height of its images."""
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        sizes = {"inception_v3": 299, "swin_v2_t": 256, "swin_v2_s": 256, "swin_v2_b": 256}
        found[f"torchvision {name}"] = (lambda name=name: torchvision.models.get_model(name)), sizes.get(name, 224)
    for name in TIMM:
        size = timm.get_pretrained_cfg(name).input_size[-1]
        found[f"timm {name}"] = (lambda name=name: timm.create_model(name)), size
    return found


def row(name: str, build: Callable[[], nn.Module], size: int) -> list[str]:
    """Return the cells of a network."""
    shape = (3, size, size)
    shapes = on_meta(build().double()).eval()
    try:
        channels = analyse(shapes, torch.empty(1, *shape, device="meta"))
    except UserError as error:
        return [name, str(size), "", "", "", "", f"refused: {error}"]
    groups = channels.groups("all")
    most = {group.name: range(1, group.size) for group in groups}
    full = count_cost(shapes, shape).macs
    share = 1 - count_cost(apply(shapes, channels.plan(most))[0], shape).macs / full
    how = "export" if channels.exported else "fx"
    heads = sum(group.kind == "heads" for group in groups)
    large = sum(p.numel() for p in shapes.parameters()) > MOST_PARAMETERS
    found = "not computed" if large else f"{difference(build, channels, shape):.0e}"
    return [name, str(size), how, str(len(groups)), str(heads or ""), f"{100 * share:.0f}", found]


def difference(build: Callable[[], nn.Module], channels: Channels, shape: tuple[int, int, int]) -> float:
    """Return the largest difference between the pruned and the masked network, as a share of the largest output."""
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.5)
    x = torch.randn(1, *shape, dtype=torch.float64)
    drop = {group.name: range(0, group.size - 1, 2) for group in channels.groups("all")}
    pruned, architecture = apply(model, channels.plan(drop))
    with torch.no_grad():
        after, masked = pruned(x), mask(model, channels, drop)(x)
        rebuilt = rebuild(build, architecture, pruned)(x)
    logits = [value[0] if isinstance(value, tuple) else value for value in (after, masked, rebuilt)]
    assert torch.equal(logits[0], logits[2]), "the rebuilt network differs"
    scale = logits[1].abs().max().item()
    assert 0 < scale < math.inf, "the comparison shows nothing"
    return (logits[0] - logits[1]).abs().max().item() / scale


def rebuild(build: Callable[[], nn.Module], architecture: Architecture, pruned: nn.Module) -> nn.Module:
    """Return the pruned network as it is loaded: a new one, cut to the architecture, with the pruned weights."""
    result = reshape(build().double(), architecture.without_positions()).eval()
    result.load_state_dict(pruned.state_dict())
    return result


def main() -> None:
    """Print a row for every network, and write all of them to the page if none is named."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|--:|---|--:|--:|--:|--:|"]
    for name, (build, size) in networks().items():
        if sys.argv[1:] and name.split()[1] not in sys.argv[1:]:
            continue
        lines.append(f"| {' | '.join(row(name, build, size))} |")
        print(lines[-1], flush=True)
        gc.collect()
    if not sys.argv[1:]:
        page = PAGE.read_text()
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + re.split(END, rest, maxsplit=1)[1])


if __name__ == "__main__":
    main()
