#!/usr/bin/env bash
# A lottery ticket on CIFAR-10 images as a folder: cifar.sh IMAGES [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
set -euo pipefail
images=$(realpath "${1:?usage: cifar.sh IMAGES}")
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=lottery_digits recipe=paper dataset=folder "dataset.root=$images" dataset.image_size=32 \
    dataset.train_limit=10000 recipe.epochs=8 recipe.finetune.epochs=2 seed=0,1,2 'arms=[finetune,scratch_e,lottery]' \
    store.root=cifar/store hydra.sweep.dir=cifar/runs "${@:2}"
python -m rethink_prune.report cifar/runs --out cifar/report
