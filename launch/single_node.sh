#!/usr/bin/env bash
# A command of ksl_ds on all GPUs of this machine (or as 2 processes on its CPU).
#
#     bash launch/single_node.sh check   launch/recipes/llama3_8b.yaml                      is everything in place?
#     bash launch/single_node.sh lottery launch/recipes/llama3_8b.yaml run_dir=runs/mine    go
#
# COMMAND and RECIPE.yaml are those of `ksl-ds --help`; key=value words after them change single keys of the recipe.
# RANKS=4 in front uses fewer GPUs.
set -euo pipefail
# shellcheck source=launch/hand_on_sigterm.sh
source "$(dirname "$0")/hand_on_sigterm.sh"

VENV=${VENV:-.venv}                            # EDIT: where ksl_ds is installed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}   # EDIT: cores of the machine / ranks

if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
[ ! -d "$VENV" ] || export PATH="$VENV/bin:$PATH"

# One rank for each GPU unless told otherwise. Without GPUs ranks are processes on the CPU.
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    RANKS=${RANKS:-2}
fi
ranks=()
[ -z "${RANKS:-}" ] || ranks=(--num_accelerators "$RANKS")

# --master_port 0 is not understood by the launcher; a second job on this machine needs another PORT.
hand_on_sigterm deepspeed "${ranks[@]}" --master_port "${PORT:-29500}" --module ksl_ds "$@"
