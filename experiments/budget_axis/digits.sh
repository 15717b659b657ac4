#!/usr/bin/env bash
# When does training from scratch catch up, on the embedded digits: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=budget_axis_digits pruner.ratio=0.3,0.6 seed=0,1,2,3,4,5,6,7 \
    store.root=digits/store hydra.sweep.dir=digits/runs "$@"
python -m rethink_prune.report digits/runs --out digits/report
