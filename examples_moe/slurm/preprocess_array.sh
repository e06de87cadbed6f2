#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# A corpus on many nodes: each task of the array makes one shard, and a second job merges them.
#
#   export INPUT=/data/corpus OUTPUT=/data/corpus_gpt2 TOKENIZER="--vocab-file vocab.json --merge-file merges.txt"
#   job=$(sbatch --parsable examples_moe/slurm/preprocess_array.sh)
#   sbatch --dependency=afterok:"$job" --array=0 examples_moe/slurm/preprocess_array.sh merge
#
# A task that is killed or requeued goes on where it was. Compressed and Parquet files are not cut: give at least as many
# of them as there are shards. --array=0-N given to sbatch changes the number of shards; to make one shard anew, set
# NUM_SHARDS to what it was: NUM_SHARDS=16 sbatch --array=3 ...
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

: "${INPUT:?error: INPUT is not set: files, folders or patterns of the corpus}"
: "${OUTPUT:?error: OUTPUT is not set: the prefix of what is written}"
: "${TOKENIZER:?error: TOKENIZER is not set: the flags of the tokenizer, such as --tokenizer-type ByteTokenizer}"
key=${JSON_KEY:-text}
root=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}} # sbatch runs a copy of this script elsewhere
[[ -f "$root/tools/preprocess_data.py" ]] || fail "$root is no checkout: submit from there, or set ROOT"
python=${PYTHON:-$root/.venv/bin/python}
[[ -x "$python" ]] || python=python3
read -r -a inputs <<<"$INPUT"
read -r -a tokenizer <<<"$TOKENIZER"
read -r -a more <<<"${EXTRA_ARGS:-}"

case "${1:-shard}" in
    shard)
        shard=${SLURM_ARRAY_TASK_ID:?error: this is no task of an array job; submit it with sbatch}
        shards=${NUM_SHARDS:-${SLURM_ARRAY_TASK_COUNT:-1}}
        exec "$python" "$root/tools/preprocess_data.py" --input "${inputs[@]}" --output-prefix "$OUTPUT" \
            --json-keys "$key" --append-eod --workers "${SLURM_CPUS_PER_TASK:-1}" \
            --num-shards "$shards" --shard-index "$shard" "${tokenizer[@]}" "${more[@]}"
        ;;
    merge)
        exec "$python" "$root/tools/merge_datasets.py" --input "$OUTPUT-*-of-*_${key}_document" \
            --output-prefix "${OUTPUT}_${key}_document"
        ;;
    *) fail "$1 is neither shard nor merge" ;;
esac
