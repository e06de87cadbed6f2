#!/usr/bin/env bash
# From nothing to a trained GPT and the same GPT with experts, in one command:
#
#   bash examples_moe/quickstart.sh
#
# Collects English text that is on this machine anyway, trains a tokenizer on it, trains a dense GPT and the same GPT
# with 8 experts in every second layer on the same tokens (the second one is stopped half-way and resumed), and shows
# what came out: a table, loss_curves.png and text that the model with experts wrote. Minutes on two CPU cores, less
# on GPUs. Run it again and it goes on where it was stopped, or shows the results at once.
set -euo pipefail

usage() {
    cat <<'END'
Usage: bash examples_moe/quickstart.sh [--corpus FILE] [--tokens N] [--out DIR]

  --corpus FILE   your own text: JSON lines with a field "text"; .jsonl, .jsonl.gz or .jsonl.zst
                  (default: the documentation of the Python installation on this machine)
  --tokens N      tokens to train each model on, such as 2M (the default) or 20M
  --out DIR       folder for everything that is made (default: quickstart_out in this checkout)

RECIPE=recommended trains both models by the recommended recipe in place of the published one (docs/planning.md).
END
}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

[[ -z "${DRY_RUN:-}" ]] || fail "DRY_RUN is for the other launch scripts; this one has no dry run, and takes minutes"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
corpus=
tokens=2M
out="$root/quickstart_out"
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --corpus | --tokens | --out)
            [[ $# -ge 2 ]] || fail "$1 needs a value" "$(usage)"
            case "$1" in
                --corpus) corpus=$2 ;;
                --tokens) tokens=$2 ;;
                --out) out=$2 ;;
            esac
            shift 2
            ;;
        *) fail "$1 is no option of this script" "$(usage)" ;;
    esac
done
if [[ -n "$corpus" ]]; then
    [[ -r "$corpus" ]] || fail "--corpus $corpus cannot be read"
    corpus="$(cd "$(dirname "$corpus")" && pwd)/$(basename "$corpus")"
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"

# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
setup_env plot
cd "$root"

# shellcheck source=examples_moe/steps.sh
source "$here/steps.sh"

gpus="$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
if [[ "$gpus" -gt 0 ]]; then
    processes=8 # the largest number that divides the 8 experts and the batch and is not above the number of GPUs
    while [[ "$processes" -gt "$gpus" ]]; do processes=$((processes / 2)); done
    precision=--bf16
    machine="$processes GPU(s), bf16"
else
    processes=2
    precision=--fp32
    machine="$processes CPU processes, fp32"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

total="$("$PYTHON" -c 'import sys; from megatron.config.option import parse_count; print(parse_count(sys.argv[1]))' \
    "$tokens")" || fail "--tokens $tokens is no count; write 2400000 or 2.4M"
batch=32
micro_batch=$((batch / processes < 16 ? batch / processes : 16))
model=(
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128
    --hidden-dropout 0 --attention-dropout 0
)
experts=(--num-experts 8 --moe-expert-parallel-size "$processes")
training=(
    --train-tokens "$total" --global-batch-size "$batch" --micro-batch-size "$micro_batch"
    --lr 2e-3 --min-lr 2e-4 --lr-warmup-tokens $((total / 24)) --lr-decay-style cosine "$precision"
    --eval-interval 75 --eval-iters 10 --log-interval 20 --save-interval 100 --keep-last 2
    ${RECIPE:+--recipe "$RECIPE"}
)
data=(
    --data-path "$out/corpus_text_document" --split "95,5,0"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$out/tokenizer.model"
    --num-workers 0
)
train() { # NAME FLAGS...
    local name=$1
    shift
    "$PYTHON" tools/torchrun.py --standalone --nproc-per-node "$processes" pretrain_gpt_moe.py \
        "${model[@]}" "${training[@]}" "${data[@]}" \
        --run-name "$name" --save "$out/$name" --load "$out/$name" "$@"
}
settings=("${model[@]}" "${training[@]}" "${data[@]}")

if [[ -z "$corpus" ]]; then
    corpus="$out/corpus.jsonl"
    step corpus corpus.jsonl "Collecting English text from this Python installation" \
        "$PYTHON" examples_moe/quickstart_corpus.py --output "$corpus"
else
    chain="$(checksum "$(ls -lL "$corpus")")"
fi
step tokenizer tokenizer.model "Training a SentencePiece tokenizer of 2048 entries" \
    "$PYTHON" tools/train_tokenizer.py --input "$corpus" --output "$out/tokenizer" --vocab-size 2048 --overwrite
step preprocess corpus_text_document.idx "Turning the text into tokens" \
    "$PYTHON" tools/preprocess_data.py --input "$corpus" --output-prefix "$out/corpus" --append-eod --overwrite \
    --workers 2 --tokenizer-type SentencePieceTokenizer --tokenizer-model "$out/tokenizer.model"
chain="$(checksum "$chain" "${settings[@]}")"
step dense dense "Training the dense GPT on $machine" train dense
step moe-first-half moe-8 "Training the GPT with 8 experts: the first half" \
    train moe-8 "${experts[@]}" --exit-tokens $((total / 2))
step moe-second-half "" "Training the GPT with 8 experts: resumed for the second half" \
    train moe-8 "${experts[@]}"

printf '\n== Results\n'
"$PYTHON" tools/plot_runs.py "$out/dense" "$out/moe-8" --table --output "$out/loss_curves.png" \
    --title "A dense GPT and the same GPT with 8 experts" | tee "$out/results.md"
printf '\n== Text by the GPT with 8 experts\n'
"$PYTHON" tools/generate.py --load "$out/moe-8" --tokenizer-model "$out/tokenizer.model" \
    --prompt "The function returns" --prompt "This module provides" --prompt "If the file does not exist, it" \
    --max-new-tokens 60 --temperature 0.7 --top-p 0.9 --seed 1 | tee "$out/samples.txt"
printf '\nLoss curves: %s\n' "$out/loss_curves.png"
printf 'Table and text: %s, %s\n' "$out/results.md" "$out/samples.txt"
printf 'Everything a run logged: %s, %s\n' "$out/dense/metrics.jsonl" "$out/moe-8/metrics.jsonl"
