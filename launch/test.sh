#!/usr/bin/env bash
# All checks and tests, as CI runs them: bash launch/test.sh [--fast] [pytest options]
# --fast: linters and the unit tests that are not marked slow.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test

ruff check .
ruff format --check .
mypy ksl_ds
codespell
shellcheck launch/*.sh launch/*.sbatch .ci/run
if [ "${1:-}" = --fast ]; then
    shift
    set -- tests/unit -m "not slow" "$@"
fi
python -m pytest -q -n 3 --dist loadfile "$@" # three files at a time on two cores: tests wait for processes more than they compute
