#!/usr/bin/env bash
# Does ksl_ds work on this machine's GPUs, and how fast? One command, under nine minutes on one H100.
#
#     bash launch/gpu_check.sh [OUT]                  # OUT: folder for gpu_check.json and gpu_check.md; default: gpu_check
#     WHEELS=folder bash launch/gpu_check.sh [OUT]    # missing packages from wheels in that folder, without a network
#     bash launch/gpu_check.sh [OUT] --rehearse       # the same code at small sizes on the CPU; its figures mean nothing
#
# Uses the python that is active (or PYTHON=...), with the torch that it has. Every part has a time limit of its own; one
# that fails does not stop the others. Exit code: 0 when no part failed, 1 otherwise, 2 where nothing could be started.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
PYTHONPATH="$PWD:$PWD/launch${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m gpu_check "$@"
