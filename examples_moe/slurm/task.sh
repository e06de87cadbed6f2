#!/usr/bin/env bash
# What srun starts as a task, so that SIGTERM and SIGUSR1 reach the trainer however early they come, and end nothing
# else.
#
#   task.sh GENERATIONS COMMAND...
#
# runs COMMAND with both signals ignored and passes them on to its descendants of that generation: 0, COMMAND is the
# trainer; 1, its children are, as torchrun's; 2, its grandchildren, as the deepspeed launcher's. It repeats them until
# COMMAND ends, since a trainer that is only being started hears nothing yet. torchrun, which hears none of it, neither
# kills its trainers 30 s after a signal nor ends with an error.
set -uo pipefail

told=
trap 'told=TERM' TERM
trap 'told=USR1' USR1

generations=$1
shift
(
    trap '' TERM USR1 # lasts in COMMAND, unless it sets handlers, and in what it starts
    trap - INT QUIT   # which the shell has its background ignore
    exec "$@"
) &
command=$!

trainers() { # prints the processes that are told
    local generation processes="$command" process children
    for ((generation = 0; generation < generations; generation++)); do
        children=
        for process in $processes; do children+=" $(cat "/proc/$process/task/"*/children 2>/dev/null)"; done
        processes=$children
    done
    echo "$processes"
}

wait "$command"
status=$?
while kill -0 "$command" 2>/dev/null; do # a signal has cut the wait short
    # shellcheck disable=SC2046 # one word a process
    kill -"$told" $(trainers) 2>/dev/null
    sleep 1
    status=
done
if [[ -z "$status" ]]; then
    wait "$command"
    status=$?
fi
exit "$status"
