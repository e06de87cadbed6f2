#!/usr/bin/env python3
"""Print what is in a checkpoint: tensors, the layout that wrote it, tokens seen. ``--help`` lists the flags."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="Print what is in a checkpoint.")
    parser.add_argument(
        "folder", metavar="DIR", help="A run's --save folder, one checkpoint, or a Hugging Face folder."
    )
    parser.add_argument("--verify", action="store_true", help="Compare every file with its checksum and the index.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 for a checkpoint that is missing or damaged; 2 for unusable flags."""
    args = parse_args(argv)
    from megatron.checkpoint import CheckpointError
    from megatron.conversion.inspect import in_words, inspect

    try:
        about = inspect(args.folder, args.verify)
        print(json.dumps(about, indent=1) if args.json else in_words(about), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
