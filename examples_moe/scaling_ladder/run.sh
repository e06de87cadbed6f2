#!/usr/bin/env bash
# How much larger must a dense model be to match a model with experts? The publication's claim in small, in one command:
#
#   bash examples_moe/scaling_ladder/run.sh --corpus books.jsonl articles.jsonl.zst
#
# Trains a ladder of dense models and models with experts on one pass over the same text, and writes a page that says
# which dense model each of them matches. Run it again after a stop and it goes on.
set -euo pipefail

usage() {
    cat <<'END'
Usage: bash examples_moe/scaling_ladder/run.sh [STEP ...] [--scale SCALE] [--corpus FILE ...] [--tokens N] [--jobs N]
       [--out DIR]

Steps, all of them in this order unless some are named:
  text        train a tokenizer on the corpus, and turn it into tokens
  rates       look for learning rates with short runs (scales full and trial; the others follow a rule)
  train       train all models, several side by side on each GPU
  time        run the first updates of each model alone, for its speed
  page        compare: page.md, results.json and figures

  --scale SCALE   pair (default): models with 32 experts against four dense models, two seeds; half an hour of one H200
                  full: also the published recipe, 64 and 128 experts, a second width, learning rates and ablations
                  trial: minutes on a CPU, too small to show anything
  --corpus FILE   your text: .jsonl, .txt (each may be .gz or .zst) or .parquet; several files are mixed by their size
                  (default of trial: the documentation of this Python installation; the others need about 2 GB, such as
                  https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet)
  --tokens N      tokens of each run, such as 200M (default: pair and full 460M, trial 131K)
  --jobs N        runs side by side on each GPU, or on the CPU (default: auto, as many as fit)
  --out DIR       folder for everything that is made (default: scaling_ladder_out in this checkout)
END
}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$(dirname "$here")")"
steps=()
corpus=()
scale=pair
tokens=
jobs=auto
out="$root/scaling_ladder_out"
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        text | rates | train | time | page) steps+=("$1") && shift ;;
        --corpus)
            shift
            while [[ $# -gt 0 && "$1" != --* ]]; do
                [[ -r "$1" ]] || fail "--corpus $1 cannot be read"
                corpus+=("$(cd "$(dirname "$1")" && pwd)/$(basename "$1")") && shift
            done
            [[ ${#corpus[@]} -gt 0 ]] || fail "--corpus needs a file" "$(usage)"
            ;;
        --scale | --tokens | --jobs | --out)
            [[ $# -ge 2 ]] || fail "$1 needs a value" "$(usage)"
            case "$1" in
                --scale) scale=$2 ;;
                --tokens) tokens=$2 ;;
                --jobs) jobs=$2 ;;
                --out) out=$2 ;;
            esac
            shift 2
            ;;
        *) fail "$1 is no step and no option of this script" "$(usage)" ;;
    esac
done
case "$scale" in
    trial) sample=2M ;;
    pair | full) sample=20M ;;
    *) fail "--scale $scale is none of pair, full, trial" ;;
esac
[[ ${#steps[@]} -gt 0 ]] || steps=(text rates train time page)
mkdir -p "$out/data"
out="$(cd "$out" && pwd)"

# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
setup_env plot
cd "$root"
# shellcheck source=examples_moe/steps.sh
source examples_moe/steps.sh

text() {
    if [[ ${#corpus[@]} -eq 0 ]]; then
        [[ "$scale" == trial ]] || fail "--scale $scale needs text: --corpus FILE ..." \
            "About 2 GB of it; --help names a public file that does."
        corpus=("$out/corpus.jsonl")
        step corpus corpus.jsonl "Collecting English text from this Python installation" \
            "$PYTHON" examples_moe/quickstart_corpus.py --output "${corpus[0]}"
    else
        chain="$(checksum "$(ls -lL "${corpus[@]}")")"
    fi
    local tokenizer="$out/data/tokenizer" number=0 file vocabulary
    vocabulary="$("$PYTHON" -c 'import sys; sys.path.insert(0, sys.argv[1]); import ladder
print(ladder.SCALES[sys.argv[2]].vocabulary)' "$here" "$scale")"
    step tokenizer data/tokenizer-vocab.json "Training a byte-level BPE of $vocabulary entries" \
        "$PYTHON" tools/train_tokenizer.py --input "${corpus[@]}" --output "$tokenizer" --model-type byte-bpe \
        --vocab-size "$vocabulary" --sample-bytes "$sample" --overwrite
    for file in "${corpus[@]}"; do
        number=$((number + 1))
        step "tokens-$number" "data/corpus${number}_text_document.idx" "Turning $(basename "$file") into tokens" \
            "$PYTHON" tools/preprocess_data.py --input "$file" --output-prefix "$out/data/corpus$number" --append-eod \
            --overwrite --workers "$(nproc)" --tokenizer-type GPT2BPETokenizer \
            --vocab-file "$tokenizer-vocab.json" --merge-file "$tokenizer-merges.txt"
    done
}

shared=(--out "$out" --scale "$scale" ${tokens:+--tokens "$tokens"})
for each in "${steps[@]}"; do
    case "$each" in
        text) text ;;
        rates | train | time)
            printf '== %s\n' "$each"
            "$PYTHON" examples_moe/scaling_ladder/train.py "$each" "${shared[@]}" --jobs "$jobs"
            ;;
        page) "$PYTHON" examples_moe/scaling_ladder/report.py "${shared[@]}" ;;
    esac
done
