#!/usr/bin/env bash
# Every pruner on one small network, CIFAR-10 images as a folder: run.sh IMAGES [OVERRIDE...]
# IMAGES holds train/<class>/* and test/<class>/*; scripts/cifar_to_folder.py makes such a folder from CIFAR-10.
set -euo pipefail
images=$(realpath "${1:?usage: run.sh IMAGES}")
cd "$(dirname "$0")"
study=(
    experiment=l1_resnet20_cifar10_cpu dataset=folder "dataset.root=$images" dataset.image_size=32
    dataset.train_limit=2000 dataset.test_limit=2000 recipe.epochs=6 recipe.finetune.epochs=2 seed=0,1
    # So much that in these few steps the norms of filters forget how they were drawn.
    recipe.weight_decay=5e-3
    # In so few epochs, the published strength would do nothing.
    recipe.strengths.slimming=0.01
)
python -m rethink_prune -m "${study[@]}" pruner=l1,random,thinet,regression,soft_filter,slimming,magnitude \
    pruner.ratio=0.3 hydra.sweep.dir=runs/ratio "${@:2}"
# Has no ratio: this strength removes a tenth of the MACs.
python -m rethink_prune -m "${study[@]}" pruner=sss pruner.sparse.strength=0.1 hydra.sweep.dir=runs/strength "${@:2}"
python -m rethink_prune.report runs --out report
