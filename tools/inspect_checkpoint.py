#!/usr/bin/env python3
"""Tell what a checkpoint holds. ``--help`` lists the flags."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Tell what a training checkpoint holds, after comparing each file with its checksum."
    )
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="Folder of checkpoints (the latest), or one of them."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when there is no checkpoint or it is damaged."""
    args = parse_args(argv)
    from megatron.checkpoint import CheckpointError
    from megatron.checkpoint.formats.inspection import describe, in_words

    try:
        found = describe(args.load)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if args.json else in_words(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
