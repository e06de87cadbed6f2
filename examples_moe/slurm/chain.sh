#!/usr/bin/env bash
# A long run as a chain of jobs, each with a time limit that the cluster allows, each going on where the last one ended.
set -euo pipefail

root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)"
# shellcheck source=examples_moe/common.sh
source "$root/examples_moe/common.sh"

chain_usage() {
    cat <<END
Usage: [VARIABLE=VALUE ...] bash $0 LINKS [FLAGS of sbatch] SCRIPT [FLAGS of pretrain_gpt_moe.py]

Submits LINKS jobs that are all the launch SCRIPT in the same words; each waits for the end of the one before it,
however that ended. A link saves when SLURM tells it that its time is nearly up, and the next one goes on from there. A
link that finds the run finished ends at once; of a run that is finished already, nothing is submitted.

  DATA_PATH=corpus_text_document bash $0 5 --time 12:00:00 examples_moe/pretrain_gpt_350M_MoE128.sh --seed 3

  variable      what it is                                                               default
  DEPENDENCY    afterany, or afterok: a link that fails ends the chain                   afterany
  REQUEUE       1: links also put themselves back into the queue, as single jobs do      0
  DRY_RUN       1: print the commands and submit nothing                                 none
  the others    those of the launch script; see: bash SCRIPT --help
END
}

finished() { # says so and succeeds if no link has anything to do; what would be wrong with every link ends the script
    local words=() line status=0
    line=$(DRY_RUN="command" bash "$script" ${arguments[@]+"${arguments[@]}"}) || exit 2
    eval "words=($line)" # quoted by the script
    while [[ ${#words[@]} -gt 0 && "${words[0]}" != */pretrain_gpt_moe.py ]]; do words=("${words[@]:1}"); done
    "$PYTHON" "$root/tools/run_finished.py" "${words[@]:1}" || status=$?
    if ((status > 1)); then exit 2; fi # a flag that is wrong or missing
    return "$status"
}

case "${1:-}" in -h | --help) chain_usage && exit 0 ;; esac
links=${1:-}
[[ "$links" =~ ^[1-9][0-9]*$ ]] || fail "LINKS is '$links'; expected a whole number from 1 on" "bash $0 --help"
shift
flags=()
while [[ $# -gt 0 && ! ("$1" == *.sh && -f "$1") ]]; do flags+=("$1") && shift; done
[[ $# -gt 0 ]] || fail "no launch script among the arguments; give one of examples_moe/" "bash $0 --help"
script=$1 && shift
arguments=("$@")
grep -q '^source .*examples_moe/common.sh' "$script" || fail "$script is not a launch script of examples_moe/"
case "${DEPENDENCY:=afterany}" in
    afterany | afterok) ;;
    *) fail "DEPENDENCY is '$DEPENDENCY'; expected afterany or afterok" ;;
esac
case "${DRY_RUN:-}" in "" | 1) ;; *) fail "DRY_RUN is '$DRY_RUN'; expected 1" ;; esac
export REQUEUE="${REQUEUE:-0}"

find_python
if finished; then exit 0; fi
after=()
for ((link = 1; link <= links; link++)); do
    command=(sbatch --parsable ${flags[@]+"${flags[@]}"} ${after[@]+"${after[@]}"} "$script")
    command+=(${arguments[@]+"${arguments[@]}"})
    if [[ -n "${DRY_RUN:-}" ]]; then
        job=JOB_OF_LINK_$link
        printf '%q ' "${command[@]}" && echo
    else
        job=$("${command[@]}") || fail "link $link of $links could not be submitted; those before it are in the queue"
        job=${job%%;*} # the name of the cluster may follow
        echo "link $link of $links: job $job"
    fi
    after=(--dependency "$DEPENDENCY:$job" --kill-on-invalid-dep=yes)
done
