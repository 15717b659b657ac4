#!/usr/bin/env bash
# Tries the next Hydra: its release candidate, OmegaConf's and the launchers' go into a temporary environment that takes
# everything else from .venv. Runs the tests of configuration and sweeps there, and prints the result in one line.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

say() { echo "Hydra 1.4 (allowed to fail): $*"; }

version=1.4.0rc3
if ! {
    # virtualenv copies no packages; a .pth file puts those of .venv behind the new ones.
    "$python" -m virtualenv --quiet --no-download "$folder/env" 2>&1
    "$python" -c 'import site; print(site.getsitepackages()[0])' \
        >"$("$folder/env/bin/python" -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
    "$folder/env/bin/python" -m pip install --quiet --no-deps --pre "hydra-core==$version" "omegaconf>=2.4.1rc1,<2.5" \
        "hydra-joblib-launcher==$version" "hydra-submitit-launcher==$version" "hydra-ray-launcher==$version" 2>&1
} >"$folder/installation"; then
    say "not tried: $(tail -n 1 "$folder/installation")"
    exit 1
fi
tests=(tests/test_config.py tests/test_conf_readme.py tests/commands/test_arguments.py tests/commands/test_sweeps.py)
status=0
PYTHONPATH=$PWD/src timeout "${1:-90}" "$folder/env/bin/python" -m pytest -q -n 0 -p no:cacheprovider "${tests[@]}" \
    -k "${2:-not machine_of_a_ray}" >"$folder/tests" 2>&1 || status=$?
grep -E '^(FAILED|ERROR)' "$folder/tests" || true
[[ $status != 124 ]] || say "ran out of time"
say "$version: $(tail -n 1 "$folder/tests")"
exit "$status"
