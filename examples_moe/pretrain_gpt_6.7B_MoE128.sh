#!/usr/bin/env bash
#SBATCH --job-name=6.7B_MoE128
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# 6.7B with 128 experts in every other layer, which was not published: 6.7B's schedule, 1.3B+MoE-128's experts.
#
#   model      32 layers, hidden size 4096, 32 heads, sequences of 2048, initial std 0.01
#   experts    128 in one layer of 2, top-1, dropless, balancing: quantile_balancing + balance loss x 0.01
#   batch      1024 sequences an update
#   schedule   300B tokens; learning rate 0.00012 to 1.2e-05, cosine over 300B, warm-up 375M
#   layout     128 processes: DP 16 TP 8 SP ETP, EP 16, micro-batches 16 of 4
#
# bash, sbatch or DRY_RUN=1 bash; --help lists what the environment can change.
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
arguments=("$@")
# shellcheck source=examples_moe/common.sh
source "$root/examples_moe/common.sh"

#   preset TP PP EP
run 6.7B+MoE-128 8 1 16
