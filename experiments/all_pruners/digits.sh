#!/usr/bin/env bash
# Every pruner on 8 x 8 digits, five seeds, for the accuracy right after pruning: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
study=(dataset.image_size=8 recipe.finetune.epochs=1 arms=[finetune] seed=0,1,2,3,4)
pruners=l1,random,thinet,regression,soft_filter,slimming,magnitude
run() { python -m rethink_prune -m "${study[@]}" hydra.sweep.dir="digits_runs/$1" "${@:2}"; }
run ratio pruner=$pruners pruner.ratio=0.3 "$@"
# Has no ratio; images this small need less than the recipe's strength.
run strength pruner=sss pruner.sparse.strength=0.2 "$@"
run macs pruner=$pruners pruner.ratio=null pruner.target_macs=0.6 "$@"
# One ranking of all filters, by three numbers: that of l1, and two of rankings.py.
run ranking pruner.name=l1,rankings:Sums,rankings:Means pruner.ranking=global pruner.ratio=null \
    pruner.target_macs=0.6 "$@"
run sparsity pruner=magnitude pruner.ratio=0.95 pruner.distribution=global,uniform,erk,lamp "$@"
report() { python -m rethink_prune.report "${@:2}" --out "digits_report/$1"; }
report digits digits_runs/ratio digits_runs/strength digits_runs/macs
report rankings digits_runs/ranking
report sparsity digits_runs/sparsity --by pruner.distribution
for name in digits rankings sparsity; do cp "digits_report/$name/results.json" "$name.json"; done
