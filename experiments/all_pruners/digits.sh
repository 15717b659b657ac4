#!/usr/bin/env bash
# Every pruner on 8 x 8 digits, five seeds, for the accuracy right after pruning: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
study=(dataset.image_size=8 recipe.finetune.epochs=1 arms=[finetune] seed=0,1,2,3,4)
python -m rethink_prune -m "${study[@]}" pruner=l1,random,thinet,regression,soft_filter,slimming,magnitude \
    pruner.ratio=0.3 hydra.sweep.dir=digits_runs/ratio "$@"
# Has no ratio; images this small need less than the default strength.
python -m rethink_prune -m "${study[@]}" pruner=sss pruner.sparse.strength=0.2 hydra.sweep.dir=digits_runs/strength "$@"
python -m rethink_prune.report digits_runs --out digits_report
