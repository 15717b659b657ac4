#!/usr/bin/env bash
# FastNAS, Torch-Pruning and our pruners at half the MACs, on digits: neighbours.sh NETWORK SIZE SEEDS [OVERRIDE...]
# such as neighbours.sh resnet20 8 0,1,2,3,4. FastNAS needs pip install "rethink-prune[neighbours]".
set -euo pipefail
network=${1:?a network, such as resnet20} size=${2:?pixels} seeds=${3:?such as 0,1,2}
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
study=("model=$network" "dataset.image_size=$size" pruner.ratio=null pruner.target_macs=0.5 precision=fp32)
run() { python -m rethink_prune -m "${study[@]}" "seed=$seeds" hydra.sweep.dir="runs/$network/$1" "${@:2}"; }
run fastnas pruner.name=fastnas:FastNAS "+pruner.images=${SEARCH_IMAGES:-400}" pruner.ranking=global "${@:4}"
run torch_pruning pruner=torch_pruning 'pruner.importance_args={p: 1}' "${@:4}"
run layer pruner=l1,random "${@:4}"
run global pruner=taylor,slimming pruner.ranking=global "${@:4}"
python -m rethink_prune.report runs --out report
cp report/results.json results.json
python compare.py results.json
