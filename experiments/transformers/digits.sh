#!/usr/bin/env bash
# ViT and ConvNeXt on the embedded digits, eight seeds: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
seeds=(seed=0,1,2,3,4,5,6,7 store.root=digits/store)
for network in convnext vit; do
  python -m rethink_prune -m "experiment=transformers_${network}_digits" "${seeds[@]}" "hydra.sweep.dir=digits/runs/$network" "$@"
done
python -m rethink_prune.report digits/runs --out digits/report
