#!/usr/bin/env bash
# Architecture search, from nothing to the curves of one question: run.sh NAME [OVERRIDE...]
#
# NAME is an experiment search_* of conf/experiment. Trains from scratch, at equal parameters, what automatic pruning finds,
# uniformly pruned networks and guided ones, whose sources are the automatic ones of the middle size, of all seeds.
# Overrides hold for all studies, e.g. run.sh search_slimming_vgg16_cifar10 seed=0,1 recipe.epochs=40
# All trainings are kept in store/: the same command goes on after a stop.
# FOLDER (NAME, beside this file) and SIZES (shares of the parameters, smallest first) may be set in the environment.
set -euo pipefail
name=${1:?usage: run.sh NAME [OVERRIDE...], where NAME is an experiment search_*}
overrides=("${@:2}")
cd "$(dirname "$0")"
FOLDER=${FOLDER:-$name}

study() { # FOLDER [OVERRIDE...]: a sweep, five seeds a study
    python -m rethink_prune -m seed=0,1,2,3,4 store.root=store "hydra.sweep.dir=$FOLDER/$1" "${@:2}"
}

compare() { # channels|weights EXPERIMENT SOURCES: the three methods; the guided ones follow what SOURCES, an experiment, finds
    local uniform=(pruner=uniform "pruner.what=$1") sizes
    case $1 in
    channels) read -ra sizes <<<"${SIZES:-0.15 0.225 0.33 0.45 0.6 0.8}" ;;
    weights) read -ra sizes <<<"${SIZES:-0.1 0.2 0.3 0.4 0.5 0.6 0.8}" ;;
    esac
    local sized=(pruner.ratio=null "pruner.target_params=$(IFS=,; echo "${sizes[*]}")") middle=${sizes[${#sizes[@]} / 2]}
    study "runs/$1/automatic" "experiment=$2" "${sized[@]}" "${overrides[@]}"
    study "runs/$1/uniform" "experiment=$2" "${uniform[@]}" 'arms=[scratch_e]' "${sized[@]}" "${overrides[@]}"
    study "sources/$1" "experiment=$3" 'arms=[scratch_e]' pruner.ratio=null "pruner.target_params=$middle" "${overrides[@]}"
    study "runs/$1/guided" "experiment=$2" pruner=guided "pruner.sources=[$FOLDER/sources/$1]" 'arms=[scratch_e]' \
        pruner.size=null "${sized[@]:1}" "${overrides[@]}"
}

# PreResNet-20 keeps at least a fifth of its parameters.
case $name in
search_slimming_digits) SIZES=${SIZES:-0.22 0.3 0.45 0.6 0.8} ;;
search_magnitude_digits) SIZES=${SIZES:-0.05 0.1 0.2 0.35 0.5} ;;
esac
case $name in
search_slimming_*) compare channels "$name" "$name" ;;
search_magnitude_*) compare weights "$name" "$name" ;;
search_guided_*) of=vgg19_cifar100 from=vgg19_cifar100 ;;
search_transferred_*) of=vgg19_cifar100 from=vgg16_cifar10 ;;
*) echo "run.sh: no experiment $name; there are search_slimming_*, search_magnitude_*, search_guided_*, search_transferred_*" >&2; exit 1 ;;
esac
if [[ -v from ]]; then
    compare channels "slimming_$of" "slimming_$from"
    compare weights "magnitude_$of" "magnitude_$from"
fi
python -m rethink_prune.report "$FOLDER/runs" --out "$FOLDER/report"
