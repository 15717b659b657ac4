#!/usr/bin/env bash
# Architecture search on CIFAR-10 images as a folder, brought to 16 x 16 pixels, PreResNet-20, three sizes: cifar.sh IMAGES [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
set -euo pipefail
images=$(realpath "${1:?usage: cifar.sh IMAGES}")
cd "$(dirname "$0")"
FOLDER=cifar SIZES="0.25 0.4 0.6" ./run.sh search_slimming_digits recipe=paper recipe.epochs=5 \
    dataset=folder "dataset.root=$images" dataset.image_size=16 dataset.pad=2 dataset.train_limit=10000 seed=0,1,2 "${@:2}"
