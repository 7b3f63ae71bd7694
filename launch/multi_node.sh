#!/usr/bin/env bash
# A command of ksl_ds on several machines, from a hostfile.
#
#     bash launch/multi_node.sh HOSTFILE check   launch/recipes/llama3_70b.yaml num_ranks=16
#     bash launch/multi_node.sh HOSTFILE lottery launch/recipes/llama3_70b.yaml num_ranks=16
#
# HOSTFILE has a line a machine, `NAME slots=GPUS`, the first of which runs rank 0. All machines see this folder, the model
# and the text under the same paths.
#
# With ssh (and pdsh) between the machines, start it once, on the first. Where there is no ssh, start it on every machine at
# the same time, each with its number:
#
#     NODE_RANK=0 bash launch/multi_node.sh HOSTFILE lottery ...    on the first machine of HOSTFILE
#     NODE_RANK=1 bash launch/multi_node.sh HOSTFILE lottery ...    on the second
set -euo pipefail
# shellcheck source=launch/hand_on_sigterm.sh
source "$(dirname "$0")/hand_on_sigterm.sh"

VENV=${VENV:-.venv}                            # EDIT: where ksl_ds is installed, on every machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}   # EDIT: cores of a machine / its ranks
# export NCCL_SOCKET_IFNAME=ib0                # EDIT: the network between the machines, where NCCL picks the wrong one
# export NCCL_IB_HCA=mlx5                      # EDIT: the InfiniBand adapters, likewise
PORT=${PORT:-29500}                            # EDIT: a port that is free on the first machine

if [ $# -lt 3 ]; then
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=$1
shift
# deepspeed only warns when the hostfile is missing, and then trains on one machine.
if [ ! -s "$hostfile" ]; then
    echo "multi_node.sh: no hostfile $hostfile" >&2
    exit 2
fi
# What deepspeed would answer with a traceback, or with ranks that wait for a host of another name.
if [ "$(head -c 3 "$hostfile")" = $'\xef\xbb\xbf' ]; then
    echo "multi_node.sh: hostfile $hostfile begins with a byte order mark; save it as UTF-8 without one" >&2
    exit 2
fi
bad=$(awk '{ sub(/^[[:space:]]+/, "") } /^(#|$)/ { next } { hosts++ }
    !/^[^[:space:]]+[[:space:]]+slots=[0-9]+/ { print "line " NR ": " $1 " has no slots=GPUS"; exit }
    seen[$1]++ { print "line " NR ": " $1 " is there twice"; exit }
    END { if (!hosts) print "names no machine" }' "$hostfile")
if [ -n "$bad" ]; then
    echo "multi_node.sh: hostfile $hostfile, $bad" >&2
    exit 2
fi
first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
first=${first#*@} # ssh logs in as USER@NAME; the ranks meet at NAME
[ ! -d "$VENV" ] || export PATH="$VENV/bin:$PATH"
options=(--hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$first}" --master_port "$PORT")

if [ -n "${NODE_RANK:-}" ]; then
    hand_on_sigterm deepspeed "${options[@]}" --no_ssh --node_rank "$NODE_RANK" --module ksl_ds "$@"
fi

# The words go through a remote shell, in which the launcher puts them between single quotes.
case "$*" in *\'*)
    echo "multi_node.sh: a word with a single quote cannot travel by ssh; write the value into the recipe" >&2
    exit 2
    ;;
esac
# Variables of names that begin with NCCL or PYTHON travel along; others belong into ~/.deepspeed_env, one NAME=VALUE a line.
exec deepspeed "${options[@]}" --launcher pdsh --module ksl_ds "$@"
