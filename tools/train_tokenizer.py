#!/usr/bin/env python3
"""Train a SentencePiece or byte-level BPE tokenizer on a corpus. ``--help`` lists the flags."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.option import parse_count
from megatron.data.bpe_training import train_bpe
from megatron.data.errors import DataError
from megatron.data.sentencepiece_training import MODEL_TYPES, train

BYTE_BPE = "byte-bpe"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece model, OUTPUT.model, or a byte-level BPE, OUTPUT-vocab.json and "
        "OUTPUT-merges.txt, that gives back every text as it was."
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="Files, folders and quoted glob patterns: .jsonl, .txt (each may be .gz or .zst) and .parquet.",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="PREFIX", help="Path and beginning of the names.")
    parser.add_argument("--vocab-size", type=parse_count, required=True, metavar="N", help="Number of pieces.")
    parser.add_argument(
        "--model-type", choices=(*MODEL_TYPES, BYTE_BPE), default="unigram",
        help=f"unigram and bpe are SentencePiece's, {BYTE_BPE} is GPT-2's kind (default: unigram).",
    )  # fmt: skip
    parser.add_argument("--json-key", default="text", metavar="KEY", help="The field with the text (default: text).")
    parser.add_argument(
        "--sample-bytes", type=parse_count, default=10_000_000, metavar="N",
        help="Train on a random choice of documents of about this size (default: 10M).",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="Of that choice (default: 1234).")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="Of SentencePiece (default: 2).")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing model.")
    parser.add_argument("--verbose", action="store_true", help="Show SentencePiece's own log.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    start = time.monotonic()
    shared = {name: getattr(args, name) for name in ("json_key", "sample_bytes", "seed", "overwrite")}
    try:
        if args.model_type == BYTE_BPE:
            paths = train_bpe(args.input, args.output, args.vocab_size, **shared)
            print(f"{' and '.join(paths)}: {args.vocab_size} tokens in {time.monotonic() - start:.1f} s")
            return 0
        path = train(
            args.input,
            args.output,
            args.vocab_size,
            model_type=args.model_type,
            threads=args.threads,
            verbose=args.verbose,
            **shared,
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{path}: {args.vocab_size} pieces in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
