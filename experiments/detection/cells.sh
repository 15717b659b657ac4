#!/usr/bin/env bash
# Transfer from CIFAR-10 images to photographs of blood cells, two seeds: cells.sh IMAGES CELLS [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
# CELLS is a folder in VOC layout, such as that of https://github.com/Shenggan/BCCD_Dataset.
set -euo pipefail
images=$(realpath "${1:?usage: cells.sh IMAGES CELLS}") cells=$(realpath "${2:?usage: cells.sh IMAGES CELLS}")
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=detection_digit_scenes transfer=voc seed=0,1 "transfer.root=$cells" \
    dataset=folder "dataset.root=$images" dataset.image_size=32 dataset.train_limit=10000 recipe.epochs=6 \
    transfer.stride=4 transfer.frozen_stages=1 transfer.min_size=180 transfer.max_size=240 \
    'transfer.anchor_sizes=[12,24,40]' transfer.proposal_channels=32 'transfer.proposals_train=[1000,200]' \
    'transfer.proposals_test=[1000,100]' transfer.regions=32 transfer.epochs=8 'transfer.milestones=[6]' \
    transfer.batch_size=4 transfer.lr=0.02 transfer.clip_norm=10 transfer.flip=false \
    store.root=cells/store hydra.sweep.dir=cells/runs "${@:3}"
python -m rethink_prune.report cells/runs --out cells/report
