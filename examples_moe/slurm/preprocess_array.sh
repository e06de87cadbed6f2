#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# A corpus on many nodes: each task of the array makes one shard, and a second job merges them.
#
#   export INPUT=/data/corpus OUTPUT=/data/corpus_gpt2 TOKENIZER="--vocab-file vocab.json --merge-file merges.txt"
#   job=$(sbatch --parsable examples_moe/slurm/preprocess_array.sh)
#   sbatch --dependency=afterok:"$job" --kill-on-invalid-dep=yes --array=0 examples_moe/slurm/preprocess_array.sh merge
#
# A task that is killed or requeued goes on where it was, and two minutes before its time limit it requeues itself. Where
# one fails, its log says why and the merge is cancelled; mend it and give the same two commands again: finished shards
# stay as they are. --array=0-N given to sbatch changes the number of shards; to make some of them only, set NUM_SHARDS
# to what it was: NUM_SHARDS=16 sbatch --array=3,7 ...
#
# Compressed files are not cut: give at least as many of them as there are shards.
#
# More variables: JSON_KEY (text), EXTRA_ARGS (more flags of tools/preprocess_data.py), ROOT (the checkout), PYTHON.
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '/^# A corpus/,/^# More variables/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
esac

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

[[ -n "${INPUT:-}" ]] || fail "INPUT is not set: files, folders or patterns of the corpus"
[[ -n "${OUTPUT:-}" ]] || fail "OUTPUT is not set: the prefix of what is written"
key=${JSON_KEY:-text}
root=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}} # sbatch runs a copy of this script elsewhere
[[ -f "$root/tools/preprocess_data.py" ]] || fail "$root is no checkout: submit from there, or set ROOT"
python=${PYTHON:-$root/.venv/bin/python}
[[ -x "$python" ]] || python=python3
set -f # patterns are the tool's to fill in
read -r -a inputs <<<"$INPUT"
read -r -a tokenizer <<<"${TOKENIZER:-}"
read -r -a more <<<"${EXTRA_ARGS:-}"

requeue() { # what the tool has noted in its journal is where the next start goes on
    trap '' USR1
    kill -TERM "$tool" 2>/dev/null || true
    echo "the time limit is near: requeueing shard $shard of $shards" >&2
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit
}

case "${1:-shard}" in
    shard)
        [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]] || fail "this is no task of an array job; submit it with sbatch"
        shard=$SLURM_ARRAY_TASK_ID
        shards=${NUM_SHARDS:-${SLURM_ARRAY_TASK_COUNT:-1}}
        ((shards > 1)) || fail "one task makes no shards that could be merged: give --array=0-1 or more, or NUM_SHARDS"
        "$python" "$root/tools/preprocess_data.py" --input "${inputs[@]}" --output-prefix "$OUTPUT" \
            --json-keys "$key" --append-eod --workers "${SLURM_CPUS_PER_TASK:-1}" \
            --num-shards "$shards" --shard-index "$shard" ${tokenizer[@]+"${tokenizer[@]}"} ${more[@]+"${more[@]}"} &
        tool=$!
        trap requeue USR1
        status=0
        wait "$tool" || status=$?
        if ((status)); then
            echo "error: shard $shard of $shards failed (exit status $status), so the shards are not merged. Mend it and" \
                "submit the array and the merge again; finished shards stay as they are" >&2
        fi
        exit "$status"
        ;;
    merge)
        exec "$python" "$root/tools/merge_datasets.py" --input "$OUTPUT-*-of-*_${key}_document" \
            --output-prefix "${OUTPUT}_${key}_document"
        ;;
    *) fail "$1 is neither shard nor merge" ;;
esac
