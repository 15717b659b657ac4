#!/usr/bin/env bash
# Regression-based channel pruning on ImageNet: the pruner on 8 x 8 digits, eight seeds, which a CPU can do: run.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
python -m rethink_prune -m model=resnet20 dataset.image_size=8 pruner=regression pruner.ratio=0.6 \
    seed=0,1,2,3,4,5,6,7 hydra.sweep.dir=runs "$@"
python -m rethink_prune.report runs --out report
cp report/results.json . && cp report/curves-*.png curves.png && cp report/differences-*.png differences.png
