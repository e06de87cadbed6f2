#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# An example of a job array: one launch script, once for each pair of a learning rate and a seed. Each task of the array
# is a job with its own checkpoints, logs and, from its own job number, port; each saves and requeues itself.
#
#   DATA_PATH=corpus_text_document sbatch examples_moe/slurm/array.sh [FLAGS of pretrain_gpt_moe.py]
#   RATES="1e-4 2e-4" SEEDS="1 2" sbatch --array=0-3 ...    --array numbers the pairs, seeds within rates
#
#   RATES     learning rates                                          3e-4 6e-4 1.2e-3
#   SEEDS     seeds                                                   1 2
#   SCRIPT    the launch script, of examples_moe/                     pretrain_gpt_125M_dense.sh
#   SAVE      folder in which each task has one of its own            checkpoints/sweep
#   the others are those of the launch script; see: bash examples_moe/pretrain_gpt_125M_dense.sh --help
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '/^# An example/,/^#   the others/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
read -r -a rates <<<"${RATES:-3e-4 6e-4 1.2e-3}"
read -r -a seeds <<<"${SEEDS:-1 2}"
if [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    echo "error: this is no task of a job array; submit with: sbatch ${BASH_SOURCE[0]}" >&2
    exit 2
fi
task=$SLURM_ARRAY_TASK_ID
pairs=$((${#rates[@]} * ${#seeds[@]}))
if ((task >= pairs)); then
    echo "error: task $task of the array, but RATES and SEEDS make $pairs pairs: sbatch --array=0-$((pairs - 1))" >&2
    exit 2
fi
rate=${rates[task / ${#seeds[@]}]}
seed=${seeds[task % ${#seeds[@]}]}

# sbatch runs a copy elsewhere; scontrol knows where it came from, and what words were given to it
script="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)"
while [[ ! -f "$script" && "$script" == *" "* ]]; do script="${script% *}"; done
folder="$(dirname "$(readlink -f "$script")")"
export RUN_NAME="lr$rate-seed$seed"
export SAVE="${SAVE:-checkpoints/sweep}/$RUN_NAME"
exec bash "$folder/../${SCRIPT:-pretrain_gpt_125M_dense.sh}" --lr "$rate" --seed "$seed" "$@"
