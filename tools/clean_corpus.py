#!/usr/bin/env python3
"""Remove duplicates and poor documents from a corpus. ``--help`` lists the flags."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.option import parse_count
from megatron.data.cleaning import Filters, clean
from megatron.data.errors import DataError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Write the documents that stay as PREFIX-00000.jsonl.zst ..., and what was removed, with reasons, "
        "as PREFIX.removed.jsonl. Without flags that remove something only broken lines are. Stopped, the same command "
        "goes on after the last file that was full; finished, it has nothing to do."
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="Files, folders and quoted glob patterns: .jsonl, .txt (each may be .gz or .zst) and .parquet.",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="Path and beginning of the names.")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="The field with the text (default: text).")
    parser.add_argument("--exact-duplicates", action="store_true", help="Remove texts that were there before.")
    parser.add_argument(
        "--near-duplicates", type=float, metavar="SHARE",
        help="Remove documents that share more than this of their runs of five words with an earlier one, such as 0.8.",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="PATH",
        help="Compare with these documents too, which are not written: held-out data, corpora that are clean already.",
    )  # fmt: skip
    quality = parser.add_argument_group("quality", "What a document must be to stay; none is on by default.")
    quality.add_argument("--min-characters", type=parse_count, default=0, metavar="N", help="Characters at least.")
    quality.add_argument("--max-characters", type=parse_count, metavar="N", help="Characters at most.")
    quality.add_argument(
        "--min-alphanumeric", type=float, default=0.0, metavar="SHARE",
        help="Letters and digits among what is no white space, such as 0.6.",
    )  # fmt: skip
    quality.add_argument(
        "--max-repeated-lines", type=float, default=1.0, metavar="SHARE",
        help="Lines that stood in the document before, such as 0.3.",
    )  # fmt: skip
    quality.add_argument(
        "--max-compression", type=float, metavar="RATIO", help="Times that zlib makes it smaller, such as 5."
    )
    parser.add_argument(
        "--part-bytes", type=parse_count, default=1_000_000_000, metavar="N",
        help="Text after which a file of output is full (default: 1B).",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="Processes that read and hash; 0: this one (default: 1)."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace existing output.")
    parser.add_argument(
        "--log-interval", type=int, default=10_000, metavar="N",
        help="Documents between two lines of progress where there is no terminal (default: 10000).",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    filters = Filters(
        args.min_characters, args.max_characters, args.min_alphanumeric, args.max_repeated_lines, args.max_compression
    )
    try:
        done = clean(
            args.input,
            args.output_prefix,
            json_key=args.json_key,
            filters=filters,
            exact=args.exact_duplicates,
            near=args.near_duplicates,
            against=args.against,
            part_bytes=args.part_bytes,
            workers=args.workers,
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
    there = " (there already, nothing to do)" if done.existing else ""
    print(f"{done.kept:,} of {done.documents:,} documents stay{there}: {', '.join(done.files)}")
    for reason, count in done.removed.most_common():
        print(f"{count:>12,} removed, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
