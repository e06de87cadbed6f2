#!/usr/bin/env python3
"""Convert checkpoints between formats. ``--help`` lists the flags."""

import argparse
import contextlib
import ctypes
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.flags import add_tokenizer_files
from megatron.config.run import OPTIONS, PRECISIONS
from megatron.conversion.formats import FORMATS, readers, writers
from megatron.conversion.job import Conversion

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a checkpoint; memory holds one tensor at a time and no GPU is needed.\n\nformats:\n"
        + "\n".join(
            f"  {name:20} {format_.help}{'' if format_.writable else '; read only'}"
            for name, format_ in FORMATS.items()
        ),
        epilog="example: tools/convert_checkpoint.py --load checkpoints/350M --to hf --save exported/350M --dtype bf16"
        "\ndocs/checkpoints.md has the details.",
    )
    keep_optimizer = ", ".join(name for name, format_ in FORMATS.items() if format_.keeps_optimizer)
    add = parser.add_argument
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--load", metavar="DIR", help="The checkpoint: a run's --save folder, or a folder of --from.")
    given.add_argument("--average", nargs="+", metavar="DIR", help="Several: the mean of their weights is taken.")
    add("--save", required=True, metavar="DIR", help="Where to; a new folder.")
    add("--from", dest="source", choices=readers(), help="Format of --load (default: found out).")
    add("--to", dest="target", choices=writers(), required=True, help="Format of --save.")
    add("--dtype", choices=PRECISIONS, help="Number format of the weights (default: as they are).")
    add(
        "--drop-optimizer",
        action="store_true",
        help=f"Leave the optimizer's state out (always so but with --to {keep_optimizer}).",
    )
    add(
        "--gelu-as-tanh",
        action="store_true",
        help="Take a model of the exact GELU, which is refused otherwise: here it is the tanh form, at most 0.0005 "
        f"away (--from {', '.join(readers('gelu_as_tanh'))}).",
    )
    add(
        "--max-shard-size",
        metavar="SIZE",
        help=f"Largest model file (--to {', '.join(writers('max_shard_size'))}; default: 5GB).",
    )
    layout = parser.add_argument_group(
        "layout",
        "Native checkpoints know no layout: these check that one can resume the result, and are recorded in it.",
    )
    layout.add_argument("--tp", type=int, metavar="N", help="Tensor-parallel processes.")
    layout.add_argument("--pp", type=int, metavar="N", help="Pipeline stages.")
    layout.add_argument("--ep", type=int, nargs="+", metavar="N", help="Expert-parallel processes (each MoE layer's).")
    experts = parser.add_argument_group("upcycling", "The other flags of these names are those of training.")
    experts.add_argument("--upcycle", action="store_true", help="A dense model gets experts, copies of its own layers.")
    experts.add_argument("--num-experts", type=int, nargs="+", metavar="N")
    experts.add_argument("--expert-interval", type=int, metavar="N")
    experts.add_argument("--topk", type=int, metavar="N")
    experts.add_argument("--mlp-type", choices=OPTIONS["mlp_type"].choices)
    experts.add_argument("--moe-router-center-input", action="store_true", default=None)
    experts.add_argument(
        "--upcycle-noise", type=float, metavar="X", help="Noise on experts, as a part of the weights' std (default: 0)."
    )
    experts.add_argument("--upcycle-seed", type=int, metavar="N", help="Of the noise and the router (default: 0).")
    files = add_tokenizer_files(parser, "Where its files are, if they moved since training or are not in --load.")
    files.add_argument("--tokenizer-type", choices=OPTIONS["tokenizer_type"].choices)
    files.add_argument("--eod-token", metavar="TOKEN", help="That ends a document (default: the model's eos_token_id).")
    return parser.parse_args(argv)


def give_memory_back() -> None:
    """Let glibc return each large tensor's memory when it is freed. By itself it soon keeps up to 32 MB of each for the
    next one, in pieces that then do not fit, and the process grows with the model."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when a checkpoint, tokenizer or disk does not do; 2 for unusable flags."""
    give_memory_back()
    args = parse_args(argv)  # before the heavy imports: --help and a wrong flag answer at once
    from megatron.checkpoint import CheckpointError
    from megatron.conversion.convert import convert

    try:
        for line in convert(Conversion(**vars(args))):
            print(line, flush=True)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half-written is deleted
    sys.exit(main())
