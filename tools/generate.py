#!/usr/bin/env python3
"""Continue prompts with a trained model. ``--help`` lists the flags."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.flags import COUNT, add_dtype_flag, add_tokenizer_files, number, tokenizer_files

DEFAULT_NEW_TOKENS = 128
LARGEST_SEED = 2**63 - 1  # what torch takes is twice that, which leaves room for the seeds of further continuations


@dataclasses.dataclass
class Request:
    """One continuation of one prompt."""

    heading: str  # where there are several
    prompt: str
    sample: int
    seed: int
    ids: list[int]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Continue prompts with a trained model. Text goes to standard output as it comes.",
        epilog='example: tools/generate.py --load checkpoints/350M --prompt "The city of" --top-p 0.9 --num-samples 3',
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Folder of checkpoints (the latest is taken), or one of them.")
    add(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="A prompt; may be given several times. '' begins a new document.",
    )  # fmt: skip
    add("--prompt-file", metavar="FILE", help="Prompts, one on each line that is not empty.")
    add(
        "--max-new-tokens", type=COUNT, metavar="N",
        help=f"Longest continuation (default: {DEFAULT_NEW_TOKENS}, or what the model's position table leaves).",
    )  # fmt: skip
    add("--num-samples", type=COUNT, default=1, metavar="N", help="Continuations of each prompt (default: 1).")
    add(
        "--temperature", type=float, default=1.0, metavar="X",
        help="Divides the logits: below 1 safer, above 1 more varied, 0 greedy (default: 1).",
    )  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K", help="Choose among the K likeliest tokens; 0: all (default: 0).")
    add(
        "--top-p", type=float, default=1.0, metavar="P",
        help="Choose among the fewest likeliest tokens that hold this probability together; 1: all (default: 1).",
    )  # fmt: skip
    add("--greedy", action="store_true", help="Always take the likeliest token.")
    add(
        "--seed", type=number(int, min=0, max=LARGEST_SEED), default=1234, metavar="N",
        help="Seed of the first continuation; each further one has the next number (default: 1234).",
    )  # fmt: skip
    add("--batch-size", type=COUNT, default=16, metavar="N", help="Continuations computed at a time (default: 16).")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is a GPU).")
    add_dtype_flag(parser)
    add("--json", action="store_true", help="Print one JSON object a continuation, each on its own line, in order.")
    add_tokenizer_files(parser)
    args = parser.parse_args(argv)
    if not args.prompt and args.prompt_file is None:
        parser.error("nothing to continue: give --prompt TEXT or --prompt-file FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when checkpoint, tokenizer or prompts do not do; 2 for unusable flags."""
    args = parse_args(argv)  # before the heavy imports: --help and a wrong flag answer at once
    from megatron.checkpoint import CheckpointError
    from megatron.inference.sampling import Sampling

    try:
        sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _generate(args, sampling)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _generate(args: argparse.Namespace, sampling: Any) -> None:
    from megatron.inference.load import DTYPES, choose_device, choose_dtype, find_checkpoint, load_model, load_tokenizer
    from megatron.inference.special_tokens import special_tokens
    from megatron.inference.text import stream_text

    prompts = _prompts(args)
    device = choose_device(args.device)
    source = find_checkpoint(args.load)
    tokenizer = load_tokenizer(source, **tokenizer_files(args))
    special = special_tokens(source.meta, tokenizer)
    ids = [tokenizer.encode(prompt) or [special.begin] for prompt in prompts]
    count = _new_tokens(args.max_new_tokens, max(map(len, ids)), source.config.model.position_rows)
    model = load_model(source, device, DTYPES[choose_dtype(args.dtype, device, source)])
    several = len(prompts) * args.num_samples > 1
    requests = [
        Request(
            f"--- prompt {number + 1}, sample {sample + 1} ---\n" if several else "",
            prompt,
            sample,
            args.seed + number * args.num_samples + sample,
            ids[number],
        )
        for number, prompt in enumerate(prompts)
        for sample in range(args.num_samples)
    ]
    show = _print_json if args.json else _print_text
    for start in range(0, len(requests), args.batch_size):
        batch = requests[start : start + args.batch_size]
        prompt_ids, seeds = [request.ids for request in batch], [request.seed for request in batch]
        show(batch, stream_text(model, tokenizer, prompt_ids, count, sampling, seeds, special.ends))


def _prompts(args: argparse.Namespace) -> list[str]:
    for prompt in args.prompt:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python passes on bytes that are no text
            raise ValueError(f"--prompt {prompt!r} is not UTF-8; give text in that encoding")
    if args.prompt_file is None:
        return args.prompt
    try:
        text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {args.prompt_file} is not UTF-8: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {args.prompt_file} holds no prompt; expected one on each line")
    return args.prompt + lines


def _new_tokens(wanted: int | None, longest: int, rows: int) -> int:
    count = wanted or min(DEFAULT_NEW_TOKENS, rows - longest)
    if count < 1:
        raise ValueError(f"a prompt of {longest} tokens leaves nothing of the model's {rows} positions; shorten it")
    if longest + count > rows:
        raise ValueError(
            f"a prompt of {longest} tokens and {count} new ones need more than the model's {rows} positions; "
            f"shorten the prompt, or use --max-new-tokens {max(rows - longest, 1)} or less"
        )
    return count


def _print_json(requests: list[Request], pieces: Iterable[Any]) -> None:
    found = [{"text": "", "tokens": [], "ended": None} for _ in requests]
    for piece in pieces:
        found[piece.number]["text"] += piece.text
        found[piece.number]["tokens"] += piece.tokens
        found[piece.number]["ended"] = piece.ended
    for request, result in zip(requests, found, strict=True):
        about = {"prompt": request.prompt, "sample": request.sample, "seed": request.seed}
        print(json.dumps(about | result, ensure_ascii=False), flush=True)


def _print_text(requests: list[Request], pieces: Iterable[Any]) -> None:
    """The first text is shown as it grows; those behind it wait until it is their turn."""
    waiting = [request.heading + request.prompt for request in requests]
    ended = [False for _ in requests]
    current = 0
    for piece in pieces:
        waiting[piece.number] += piece.text
        ended[piece.number] = piece.ended is not None
        while current < len(requests):
            print(waiting[current], end="", flush=True)
            waiting[current] = ""
            if not ended[current]:
                break
            print("\n", flush=True)
            current += 1


if __name__ == "__main__":
    sys.exit(main())
