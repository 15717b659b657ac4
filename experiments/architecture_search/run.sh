#!/usr/bin/env bash
# Architecture search, from nothing to the curves of one question: run.sh NAME [OVERRIDE...]
# NAME is an experiment search_* of conf/experiment. All trainings are kept in store/: the same command goes on after a
# stop. Overrides hold for all studies, e.g. run.sh search_slimming_vgg16_cifar10 seed=0,1 recipe.epochs=40
set -euo pipefail
name=${1:?usage: run.sh NAME [OVERRIDE...], where NAME is an experiment search_*}
cd "$(dirname "$0")"
study() { # FOLDER [OVERRIDE...]: the studies of a sweep, five seeds each
    python -m rethink_prune -m seed=0,1,2,3,4 store.root=store "hydra.sweep.dir=$name/$1" "${@:2}"
}
case $name in
search_slimming_*) more=(pruner=uniform) ratios=0.1,0.2,0.3,0.4,0.5,0.6 ;;
search_magnitude_*) more=(pruner=uniform pruner.what=weights 'arms=[scratch_e]') ratios=0.1,0.2,0.4,0.5,0.6,0.7,0.8 ;;
search_guided_*) source=slimming_vgg19_cifar100 ;;
search_transferred_*) source=search_slimming_vgg16_cifar10 ;;
*) echo "run.sh: no experiment $name; there are search_slimming_*, search_magnitude_*, search_guided_*, search_transferred_*" >&2; exit 1 ;;
esac
if [[ -v ratios ]]; then
    study runs/automatic experiment="$name" pruner.ratio=$ratios "${@:2}"
    study runs/uniform experiment="$name" "${more[@]}" pruner.ratio=$ratios "${@:2}"
else
    # The networks to follow; then slimming and uniform pruning of the network itself, to compare with.
    study sources experiment=$source pruner.ratio=0.5 'arms=[scratch_e]' "${@:2}"
    network=(experiment=slimming_vgg19_cifar100 'arms=[scratch_e]')
    study runs/automatic "${network[@]}" pruner.ratio=0.2,0.3,0.4,0.5 "${@:2}"
    study runs/uniform "${network[@]}" pruner=uniform '~pruner.sparse' pruner.ratio=0.1,0.2,0.3,0.4,0.6 "${@:2}"
    study runs/guided experiment="$name" "pruner.sources=[$name/sources]" \
        pruner.size=null pruner.target_params=0.15,0.225,0.33,0.45,0.6,0.8 "${@:2}"
fi
python -m rethink_prune.report "$name/runs" --out "$name/report"
