#!/usr/bin/env bash
# A small ViT on real images: cifar.sh FOLDER [OVERRIDE...], with train/ and test/ of a folder dataset of ten classes
set -euo pipefail
folder=$(realpath "${1:?a folder with train/ and test/}")
shift
cd "$(dirname "$0")"
python -m rethink_prune -m dataset=folder "dataset.root=$folder" dataset.image_size=32 dataset.train_limit=2500 \
  dataset.test_limit=1000 model=vit_tiny model.patch_size=8 model.dim=64 model.depth=3 model.heads=4 recipe=vit_digits \
  recipe.lr=0.003 recipe.epochs=8 recipe.warmup=2 recipe.finetune.epochs=2 pruner=l1 pruner.ratio=0.5 \
  'arms=[finetune,scratch_e,scratch_b]' seed=0,1,2 store.root=cifar/store hydra.sweep.dir=cifar/runs "$@"
python -m rethink_prune.report cifar/runs --out cifar/report
