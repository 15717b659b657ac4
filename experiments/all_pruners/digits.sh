#!/usr/bin/env bash
# Every pruner on the default study, five seeds, for the accuracy right after pruning: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
study=(arms=[finetune] seed=0,1,2,3,4)
python -m rethink_prune -m "${study[@]}" pruner=l1,random,thinet,regression,soft_filter,slimming,magnitude \
    pruner.ratio=0.3 hydra.sweep.dir=digits_runs/ratio "$@"
# Has no ratio; its random counterpart is told the MACs.
python -m rethink_prune -m "${study[@]}" pruner=sss hydra.sweep.dir=digits_runs/strength "$@"
python -m rethink_prune.report digits_runs --json digits.json
