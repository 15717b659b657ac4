#!/usr/bin/env bash
# Tries Hydra 1.4, of which there is a release candidate: installs it, its launchers and its OmegaConf into a temporary
# environment, which takes everything else from .venv; runs a few tests there; prints the result in its last line.
set -euo pipefail
cd "$(dirname "$0")/.."
candidate=1.4.0rc3
packages=("omegaconf>=2.4.1rc1,<2.5")
for name in hydra-core hydra-joblib-launcher hydra-submitit-launcher hydra-ray-launcher; do
    packages+=("$name==$candidate")
done
# One run with a wrong value, and a sweep by each launcher.
tests="local_processes or jobs_of_a_slurm_cluster or jobs_on_ray or (wrong_input and arguments0)"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
install() {
    .venv/bin/python -m venv "$folder/env" || return
    # Python looks there after the environment's own packages.
    site_packages .venv/bin/python >"$(site_packages "$folder/env/bin/python")/others.pth" || return
    "$folder/env/bin/python" -m pip install --quiet --no-deps "${packages[@]}"
}
if ! install >"$folder/log" 2>&1; then
    echo "Hydra $candidate: not tried: $(tail -n 1 "$folder/log")"
    exit 1
fi
status=0
# Without warnings: it asks for functions that 1.3 does not have.
PYTHONWARNINGS=ignore PYTHONPATH=$PWD/src timeout --signal=INT --kill-after=10 90 "$folder/env/bin/python" -m pytest -q -p no:cacheprovider -n 2 -k "$tests" \
    tests/commands >"$folder/log" 2>&1 || status=$?
grep -E "^(FAILED|ERROR) |^E  " "$folder/log" | cut -c 1-200 || true
if [[ $status == 124 ]]; then
    echo "Hydra $candidate: the tests took more than 90 s"
else
    echo "Hydra $candidate: $(tail -n 1 "$folder/log")"
fi
exit "$status"
