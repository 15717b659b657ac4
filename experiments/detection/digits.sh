#!/usr/bin/env bash
# Transfer to detection on embedded digits, five seeds: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
python -m rethink_prune -m experiment=detection_digit_scenes transfer.epochs=12 transfer.test_scenes=100 seed=0,1,2,3,4 \
    store.root=digits/store hydra.sweep.dir=digits/runs "$@"
python -m rethink_prune.report digits/runs --out digits/report
