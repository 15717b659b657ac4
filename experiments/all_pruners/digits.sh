#!/usr/bin/env bash
# Every pruner on the digits, five seeds, for the accuracy right after pruning: digits.sh [OVERRIDE...]
# Once with the default weight decay, and once with so much that the norms of filters forget how they were drawn.
set -euo pipefail
cd "$(dirname "$0")"
study=(dataset.image_size=8 recipe.finetune.epochs=1 arms=[finetune] seed=0,1,2,3,4)
for decay in 1e-4 1e-2; do
    runs=digits_runs/$decay
    python -m rethink_prune -m "${study[@]}" recipe.weight_decay=$decay pruner.ratio=0.3 \
        pruner=l1,random,thinet,regression,soft_filter,slimming,magnitude hydra.sweep.dir="$runs/ratio" "$@"
    # Has no ratio; images this small need less than the default strength. A seed in which nothing reaches zero fails.
    python -m rethink_prune -m "${study[@]}" recipe.weight_decay=$decay pruner=sss pruner.sparse.strength=0.2 \
        hydra.sweep.dir="$runs/strength" "$@" || true
    python -m rethink_prune.report "$runs" --json "digits_$decay.json"
    python table.py "digits_$decay.json"
done
