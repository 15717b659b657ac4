"""Turn torchvision's CIFAR-10 or CIFAR-100 into image folders: TARGET/train/<class>/*, TARGET/test/<class>/*.

    python scripts/cifar_to_folder.py --dataset cifar10 --source datasets --target datasets/cifar10-folder
    python -m rethink_prune dataset=folder dataset.root=datasets/cifar10-folder

PNG files keep every pixel; ``--jpeg-quality 90`` writes smaller files, whose results are not comparable with
published ones.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm


def main() -> None:
    options = parse_arguments()
    if options.target.exists() and (not options.target.is_dir() or any(options.target.iterdir())):
        sys.exit(f"--target {options.target}: is there already and not empty; give a new folder")
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[options.dataset]
    for side in ("train", "test"):
        try:
            images = dataset(options.source, train=side == "train", download=True)
        except (OSError, RuntimeError) as error:
            sys.exit(
                f"--source {options.source}: could not download {options.dataset} ({error}); put "
                f"{dataset.filename} (md5 {dataset.tgz_md5}, from {dataset.url}) there"
            )
        write_side(images, options.target / side, limit=options.limit, jpeg_quality=options.jpeg_quality)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("datasets"),
        help="where CIFAR is, or is downloaded to (%(default)s)",
    )
    parser.add_argument("--target", type=Path, required=True, help="the new folder")
    parser.add_argument("--jpeg-quality", type=int, choices=range(1, 101), metavar="Q", help="1 to 100")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of each class and side")
    return parser.parse_args()


def write_side(images: CIFAR10, target: Path, *, limit: int | None, jpeg_quality: int | None) -> None:
    """Write the images of train or test, numbered within their class in CIFAR's order."""
    for name in images.classes:
        (target / name).mkdir(parents=True)
    written: Counter[str] = Counter()
    for image, label in tqdm(images, desc=target.name, unit="image", disable=None):
        name = images.classes[label]
        if limit is not None and written[name] >= limit:
            continue
        path = target / name / f"{written[name]:04d}"
        if jpeg_quality is None:
            image.save(path.with_suffix(".png"))
        else:
            image.save(path.with_suffix(".jpg"), quality=jpeg_quality)
        written[name] += 1


if __name__ == "__main__":
    main()
