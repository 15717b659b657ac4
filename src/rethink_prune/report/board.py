"""A report in TensorBoard: every arm's top-1 over the epochs, as the mean over seeds in a band."""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rethink_prune.report.groups import RunGroup
from rethink_prune.text import markdown

_LONGEST_NAME = 60  # of a folder; in bytes it may be four times as long

# Under names of their own: "Custom scalars" draws runs that have all three tags or none of them.
_BAND_TAGS = {kind: f"seeds/top1_test_{kind}" for kind in ("mean", "least", "greatest")}
_BAND = {"Seeds: mean, least and greatest": {"top-1 by epoch": ["Margin", list(_BAND_TAGS.values())]}}


def seed_curves(groups: Iterable[RunGroup]) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """Return each seed's top-1 after every epoch, by the group's label and the arm's name."""
    labelled = {}
    for group in groups:
        settings = (f"{name}={value}" for name, value in group.by)
        study = (group.study.dataset, group.study.model, group.study.pruner, group.study.target_text, *settings)
        curves: dict[str, list[tuple[float, ...]]] = defaultdict(list)
        for run in group.runs:
            for arm, trained in run.trained.items():
                if trained.curve is not None:
                    curves[arm].append(trained.curve)
        labelled[f"{' '.join(study)} {group.study.recipe} recipe {group.study.budget} budget"] = curves
    return labelled


def write_seed_curves(groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], folder: Path) -> None:
    """Write the mean, the least and the greatest top-1 over seeds, per arm and epoch.

    Every arm of every group becomes a run ``<group>/<arm>``. Its mean has the tag that single runs have
    (``top1/test``), so both show in one chart; the "Custom scalars" tab shows it in a band from least to greatest. An
    epoch counts if all seeds have reached it. The Text tab says how many seeds there are and where they ended.

    Parameters
    ----------
    groups
        By the group's label and the arm's name: of each seed the top-1 in percent after each epoch.
    folder
        What is in it is replaced.
    """
    # Importing it loads torch.
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for number, (label, arms) in enumerate(groups.items()):
        group = _folder_name(label)
        # Labels can differ in what a folder's name cannot hold.
        group_folder = folder / (f"{group} ({number})" if (folder / group).exists() else group)
        ends = []
        for arm, seeds in arms.items():
            # Without `strict`, zip ends with the shortest seed.
            epochs = [(fmean(values), min(values), max(values)) for values in zip(*seeds, strict=False)]
            with SummaryWriter(str(group_folder / _folder_name(arm))) as writer:
                writer.add_custom_scalars(_BAND)
                for epoch, band in enumerate(epochs, 1):
                    for tag, value in zip(("top1/test", *_BAND_TAGS.values()), (band[0], *band), strict=True):
                        writer.add_scalar(tag, value, epoch)
            if epochs:
                ends.append([arm, str(len(seeds)), str(len(epochs)), *(f"{value:.2f}" for value in epochs[-1])])
        with SummaryWriter(str(group_folder)) as writer:
            writer.add_text("summary", markdown(["arm", "seeds", "epoch", "mean top-1 %", "least", "greatest"], ends))


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.,=+ -]+", "_", label)[:_LONGEST_NAME].strip(". ") or "_"
