#!/usr/bin/env bash
# ViT, ConvNeXt and a ResNet on the embedded digits, eight seeds: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
seeds=(seed=0,1,2,3,4,5,6,7 store.root=digits/store)
arms='arms=[finetune,scratch_e,scratch_b,lottery]'
for network in convnext vit; do
  python -m rethink_prune -m "experiment=transformers_${network}_digits" "${seeds[@]}" "hydra.sweep.dir=digits/runs/$network" "$@"
done
# The same images, epochs and share of channels for a convolutional network with its own recipe.
python -m rethink_prune -m model=resnet20 dataset=digits recipe=digits recipe.epochs=20 recipe.finetune.epochs=5 pruner=l1 \
  pruner.ratio=0.5 "$arms" "${seeds[@]}" hydra.sweep.dir=digits/runs/resnet20 "$@"
python -m rethink_prune.report digits/runs --out digits/report
