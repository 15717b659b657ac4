#!/usr/bin/env bash
# Sparse Structure Selection on ImageNet: the pruner on 16 x 16 digits, eight seeds, which a CPU can do: run.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
python -m rethink_prune -m model=resnet20 pruner=sss \
    seed=0,1,2,3,4,5,6,7 hydra.sweep.dir=runs "$@"
python -m rethink_prune.report runs --out report
cp report/results.json . && cp report/curves-*.png curves.png && cp report/differences-*.png differences.png
