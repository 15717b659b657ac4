#!/usr/bin/env bash
# When does training from scratch catch up, on CIFAR-10 images as a folder: cifar.sh IMAGES [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
set -euo pipefail
images=$(realpath "${1:?usage: cifar.sh IMAGES}")
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=budget_axis_resnet56_cifar10 model=resnet20 dataset=folder "dataset.root=$images" \
    dataset.image_size=32 dataset.train_limit=10000 recipe.epochs=8 recipe.finetune.epochs=2 seed=0,1,2 \
    'arms=[finetune,retrain@1,retrain@2,retrain@4,retrain@8,scratch@1,scratch@2,scratch@4,scratch@8,scratch@total:1,scratch@total:2,scratch@total:4,scratch@total:8]' \
    store.root=cifar/store hydra.sweep.dir=cifar/runs "${@:2}"
python -m rethink_prune.report cifar/runs --out cifar/report
