#!/usr/bin/env bash
# Architecture search on the embedded digits, VGG-11 and PreResNet-20, five sizes: digits.sh [OVERRIDE...]
set -euo pipefail
cd "$(dirname "$0")"
FOLDER=digits/slimming-vgg11 SIZES="0.01 0.02 0.05 0.1 0.2" ./run.sh search_slimming_digits model=vgg11 model.head=linear "$@"
FOLDER=digits/slimming-preresnet20 ./run.sh search_slimming_digits "$@"
# With masks every size costs as much as the whole network.
FOLDER=digits/magnitude-vgg11 SIZES="0.01 0.02 0.05 0.1 0.2" ./run.sh search_magnitude_digits \
    model=vgg11 model.head=linear recipe.epochs=6 seed=0,1,2 "$@"
