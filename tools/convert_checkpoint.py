#!/usr/bin/env python3
"""Convert checkpoints between formats. ``--help`` lists the flags."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

TOKENIZERS = ("GPT2BPETokenizer", "SentencePieceTokenizer", "HFTokenizer")
FORMATS = ("native", "hf")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint; memory holds one tensor at a time and no GPU is needed. docs/checkpoints.md "
        "tells the formats.",
        epilog="example: tools/convert_checkpoint.py --load checkpoints/350M --to hf --save exported/350M --dtype bf16",
    )
    add = parser.add_argument
    add(
        "--load", nargs="+", required=True, metavar="DIR",
        help="The checkpoint: a run's --save folder, or a folder of --from. Of several the weights are averaged.",
    )  # fmt: skip
    add("--save", required=True, metavar="DIR", help="Where to; a new folder.")
    add("--from", dest="source", choices=FORMATS, help="Format of --load (default: found out).")
    add("--to", dest="target", choices=FORMATS, required=True, help="Format of --save.")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="Number format of the weights (default: as they are).")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="Largest model file of --to hf (default: 5GB).")
    add(
        "--drop-optimizer",
        action="store_true",
        help="Leave out Adam's moments; a run that loads the rest starts them anew.",
    )
    add(
        "--reset-clock",
        action="store_true",
        help="Set the tokens seen to 0: a run that loads it starts its schedule anew.",
    )
    experts = parser.add_argument_group("upcycling", "A dense model becomes one with experts (needs --drop-optimizer).")
    add = experts.add_argument
    add("--upcycle", action="store_true", help="Make experts out of copies of the dense feed-forward layers.")
    add("--num-experts", type=int, nargs="+", metavar="N", help="As in training.")
    add("--expert-interval", type=int, default=2, metavar="N", help="As in training (default: 2).")
    add("--topk", type=int, default=1, metavar="K", help="As in training (default: 1).")
    add("--mlp-type", choices=("standard", "residual"), default="standard", help="As in training (default: standard).")
    add(
        "--expert-noise", type=float, default=0.0, metavar="X",
        help="Noise on each expert's matrices, as a multiple of their standard deviation (default: 0).",
    )  # fmt: skip
    add("--seed", type=int, default=1234, help="Of the noise and the router (default: 1234).")
    files = parser.add_argument_group(
        "tokenizer", "Where its files are, if they moved since training or are not in --load."
    )
    files.add_argument("--tokenizer-type", choices=TOKENIZERS)
    for flag in ("--vocab-file", "--merge-file", "--tokenizer-model"):
        files.add_argument(flag, metavar="FILE")
    args = parser.parse_args(argv)
    if args.upcycle and (not args.num_experts or min(args.num_experts) < 1 or max(args.num_experts) < 2):
        parser.error("--upcycle needs --num-experts N with N above 1")
    for flag in ("expert_interval", "topk"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; expected at least 1")
    if args.num_experts and not args.upcycle:
        parser.error("--num-experts belongs to --upcycle; add it, or leave this out")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when a checkpoint, tokenizer or disk does not do; 2 for unusable flags."""
    args = parse_args(argv)  # before the heavy imports: --help and a wrong flag answer at once
    from megatron.checkpoint import CheckpointError
    from megatron.checkpoint.formats.convert import Conversion, convert

    try:
        for line in convert(Conversion(**vars(args))):
            print(line, flush=True)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
