#!/usr/bin/env bash
# ResNet-20, L1-norm pruning, CIFAR-10 images as a folder, three seeds: run.sh IMAGES [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
set -euo pipefail
images=$(realpath "${1:?usage: run.sh IMAGES}")
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=l1_resnet20_cifar10_cpu \
    dataset=folder dataset.root="$images" dataset.image_size=32 \
    seed=0,1,2 hydra.sweep.dir=runs "${@:2}"
python -m rethink_prune.report runs --out report
