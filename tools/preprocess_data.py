#!/usr/bin/env python3
"""Tokenize a corpus into Megatron's .bin/.idx. ``--help`` lists the flags."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.flags import add_tokenizer_options, config_from_args
from megatron.data.errors import DataError
from megatron.data.preprocess import preprocess
from megatron.data.reading import TEXT_DOCUMENTS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; those of the tokenizer are the training run's."""
    parser = argparse.ArgumentParser(
        description="Tokenize a corpus into datasets PREFIX_KEY_document.bin/.idx, as Megatron reads them. Stopped at "
        "any moment, the same command goes on; finished, it has nothing to do."
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="Files, folders and quoted glob patterns: .jsonl, .txt (each may be .gz or .zst) and .parquet; "
        "- reads JSON lines from standard input.",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="Path and beginning of the names.")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="Fields, a dataset each (default: text)."
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="End each document with the end-of-document token; GPT needs it."
    )
    parser.add_argument(
        "--text-documents", choices=TEXT_DOCUMENTS, default=TEXT_DOCUMENTS[0],
        help="What a document of a .txt file is: all of it, or each line that is not empty (default: file).",
    )  # fmt: skip
    add_tokenizer_options(parser)
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="Tokenizing processes; 0: this one (default: 1)."
    )
    parser.add_argument(
        "--max-rejected", type=float, default=0.001, metavar="SHARE",
        help="Share of broken lines to do without; they are listed in PREFIX.rejected.jsonl (default: 0.001).",
    )  # fmt: skip
    parser.add_argument(
        "--num-shards", type=int, default=1, metavar="N",
        help="Make one of N shards, PREFIX-INDEX-of-N_KEY_document, for tools/merge_datasets.py (default: 1).",
    )  # fmt: skip
    parser.add_argument("--shard-index", type=int, default=0, metavar="I", help="Which shard, from 0 (default: 0).")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace existing output, and drop what another run left unfinished."
    )
    parser.add_argument(
        "--log-interval", type=int, default=10_000, metavar="N",
        help="Documents between two lines of progress where there is no terminal (default: 10000).",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    data = config_from_args(args).data
    start = time.monotonic()
    try:
        done = preprocess(
            args.input,
            args.output_prefix,
            data,
            json_keys=args.json_keys,
            append_eod=args.append_eod,
            text_documents=args.text_documents,
            workers=args.workers,
            max_rejected=args.max_rejected,
            num_shards=args.num_shards,
            shard_index=args.shard_index,
            overwrite=args.overwrite,
            log_interval=args.log_interval,
        )
    except (DataError, OSError) as error:
        where = f", writing {args.output_prefix}" if isinstance(error, OSError) and error.filename is None else ""
        print(f"error: {error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was published, and the same command goes on", file=sys.stderr)
        return 130
    how = "there already, nothing to do" if done.existing else f"in {time.monotonic() - start:.1f} s"
    print(f"{done.documents:,} documents, {done.tokens:,} tokens {how}: {', '.join(done.prefixes)}")
    if done.rejected:
        print(f"{done.rejected:,} broken lines were left out, see {done.rejected_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
