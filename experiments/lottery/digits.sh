#!/usr/bin/env bash
# Lottery tickets on the embedded digits, two learning rates: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
study=(python -m rethink_prune -m experiment=lottery_digits recipe.lr=0.1,0.01 seed=0,1,2,3,4,5,6,7 store.root=digits/store)
# Channels, at once.
"${study[@]}" pruner.ratio=0.6 hydra.sweep.dir=digits/runs/channels "$@"
# Single weights, at once and in three rounds.
weights=(pruner=magnitude pruner.ratio=0.9 'arms=[scratch_e,lottery]')
"${study[@]}" "${weights[@]}" hydra.sweep.dir=digits/runs/weights "$@"
"${study[@]}" "${weights[@]}" pruner.rounds=3 hydra.sweep.dir=digits/runs/rounds "$@"
python -m rethink_prune.report digits/runs --by recipe.lr --out digits/report
