# shellcheck shell=bash
# Sourced by single_node.sh and multi_node.sh.

# hand_on_sigterm COMMAND...: runs a command and exits with its status. A SIGTERM goes to the command's children: started without ssh,
# the deepspeed launcher does not hand it on to its own, which would end the ranks in order.
hand_on_sigterm() {
    "$@" &
    job=$!
    trap 'pkill -TERM -P "$job" || true' TERM
    status=0
    while kill -0 "$job" 2>/dev/null; do
        wait "$job" && status=0 || status=$? # a signal ends the waiting too
    done
    exit "$status"
}
