#!/bin/sh
# Runs check_gpu.py with the code beside it, whatever version is installed. PYTHON names another python3.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/scripts/check_gpu.py" "$@"
