#!/usr/bin/env python3
"""Show what is in a dataset (.bin/.idx) and check it. ``--help`` lists the flags."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config import DataConfig
from megatron.config.flags import add_tokenizer_options, config_from_args
from megatron.data import manifest
from megatron.data.errors import DataError
from megatron.data.inspection import inspect, plot, samples, text_of, verify
from megatron.data.tokenizer import build_tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Counts, a histogram of documents' lengths and decoded samples of datasets; --verify checks them."
    )
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="Dataset, without .bin and .idx.")
    parser.add_argument(
        "--verify", action="store_true",
        help="Read everything and compare it with the manifest: checksums, counts, inputs that are still there, and "
        "the tokenizer if its flags are given. Exit status 1 where something is wrong.",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="Show N documents (default: 0).")
    parser.add_argument("--seed", type=int, default=1234, help="Of the choice of samples (default: 1234).")
    parser.add_argument("--plot", metavar="FILE", help="Draw the histogram of one dataset, such as lengths.png.")
    parser.add_argument("--json", metavar="FILE", help="Write the counts as JSON.")
    add_tokenizer_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    data = config_from_args(args).data
    broken = False
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] - samples are of any language
    try:
        if args.plot and len(args.prefix) > 1:
            raise DataError(f"--plot draws one dataset, got {len(args.prefix)}")
        if args.samples < 0:
            raise DataError(f"--samples {args.samples}: expected 0 or more")
        tokenizer = build_tokenizer(data) if args.samples or data != DataConfig() else None
        reports = []
        for number, word in enumerate(args.prefix):
            prefix = word.removesuffix(".idx").removesuffix(".bin")
            if args.verify:
                problems, remarks = verify(prefix, tokenizer)
                broken |= bool(problems)
                for line in [f"wrong: {problem}" for problem in problems] + remarks or ["everything is as it was made"]:
                    print(f"{prefix}: {line}")
                if problems:
                    continue
            reports.append(inspect(prefix))
            print("\n" * bool(number) + text_of(reports[-1], manifest.read(prefix)))
            if args.samples and tokenizer is not None:
                for document, text in samples(prefix, tokenizer, args.samples, args.seed):
                    print(f"--- document {document}\n{text}")
            if args.plot:
                plot(reports[-1], args.plot)
        if args.json:
            Path(args.json).write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=2) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
