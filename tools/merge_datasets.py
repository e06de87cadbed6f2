#!/usr/bin/env python3
"""Merge datasets (.bin/.idx) into one, or split one. ``--help`` lists the flags."""

import argparse
import glob
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.data.errors import DataError
from megatron.data.merging import merge, split


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Merge datasets into PREFIX.bin/.idx, one after another (shards of one corpus in their order), or "
        "split one into PREFIX_train, PREFIX_valid and PREFIX_test."
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX",
        help="Datasets, without .bin and .idx; quoted glob patterns are filled in.",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="Of what is written.")
    parser.add_argument(
        "--split",
        metavar="SHARES",
        help="Cut one dataset into these shares, such as 98,1,1, in the order it has, for "
        "--train-data-path, --valid-data-path and --test-data-path of training.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace existing output.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    try:
        prefixes = [prefix for word in args.input for prefix in _datasets(word)]
        if args.split is None:
            written = [merge(prefixes, args.output_prefix, overwrite=args.overwrite)]
        elif len(prefixes) > 1:
            raise DataError(f"--split takes one dataset, got {len(prefixes)}; merge them first")
        else:
            written = split(prefixes[0], args.output_prefix, args.split, overwrite=args.overwrite)
    except (DataError, OSError) as error:
        where = f", writing {args.output_prefix}" if isinstance(error, OSError) and error.filename is None else ""
        print(f"error: {error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; give the same command again", file=sys.stderr)
        return 130
    for made in written:
        there = " there already, nothing to do" if made.existing else ""
        print(f"{made.prefix}: {made.documents:,} documents, {made.tokens:,} tokens{there}")
    return 0


def _datasets(word: str) -> list[str]:
    literal = word.removesuffix(".idx").removesuffix(".bin")
    if not glob.has_magic(word) or os.path.exists(f"{literal}.idx"):
        return [literal]
    found = sorted(path.removesuffix(".idx") for path in glob.glob(word.removesuffix(".idx") + ".idx"))
    found = [prefix for prefix in found if not prefix.endswith(".incomplete")]
    if not found:
        raise DataError(f"--input {word}: no dataset fits this pattern")
    return found


if __name__ == "__main__":
    sys.exit(main())
