#!/usr/bin/env bash
#SBATCH --job-name=eval_zero_shot
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Scores a checkpoint on the publication's six zero-shot tasks (docs/evaluation.md).
#
#   LOAD=checkpoints/350M_MoE128 EP=8 bash examples_moe/eval_zero_shot.sh [FLAGS of tools/evaluate.py]
#
# LOAD: the checkpoints' folder. OUTPUT: of the scores (scores/ and LOAD's name). EP: processes that share the experts
# (1). DATA_DIR: the tasks' files (the hub). TASKS, NNODES, GPUS_PER_NODE, LAUNCHER, SRUN_ARGS, NODE_RANK, MASTER_ADDR,
# MASTER_PORT, PYTHON: as in the launch scripts. DRY_RUN=1 prints the command.
set -euo pipefail

script="${BASH_SOURCE[0]}"
if [[ -n "${SLURM_JOB_ID:-}" && ! -L "$script" && ! -f "$(dirname "$script")/common.sh" ]]; then
    # sbatch runs a copy elsewhere; scontrol knows where it came from, and what words were given to it
    script="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)"
    while [[ ! -f "$script" && "$script" == *" "* ]]; do script="${script% *}"; done
fi
if [[ -L "$script" ]]; then script="$(readlink -f "$script")"; fi
root="$(cd "$(dirname "$script")/.." && pwd)"
if [[ ! -f "$root/examples_moe/common.sh" ]]; then
    echo "error: $script is a copy; start the script of a checkout's examples_moe/, or a link to it" >&2
    exit 2
fi
# shellcheck source=examples_moe/common.sh
source "$root/examples_moe/common.sh"

case "${1:-}" in -h | --help) sed -n '/^# Scores/,/^# MASTER_PORT/s/^# \{0,1\}//p' "$script" && exit 0 ;; esac
[[ -n "${LOAD:-}" ]] || fail "LOAD is not set; give the folder of the checkpoints: LOAD=checkpoints/350M_MoE128 bash $script"
find_sizes
find_python
# shellcheck disable=SC2034 # start_with reads it
RUN_NAME=eval_zero_shot
command=()
start_with
command+=("$root/tools/evaluate.py" --load "$LOAD" --output "${OUTPUT:-scores/$(basename "$LOAD")}")
command+=(--expert-parallel "${EP:-1}" ${DATA_DIR:+--data-dir "$DATA_DIR"} ${TASKS:+--tasks "$TASKS"} "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}" && echo
else
    exec "${command[@]}"
fi
