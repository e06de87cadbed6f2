#!/usr/bin/env python3
"""Perplexity of a trained model on any text. ``--help`` lists the flags."""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.flags import COUNT, add_dtype_flag, add_tokenizer_files, tokenizer_files

FIGURES = 1 << 20  # bytes of --output, and more


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Perplexity of a text: per token, per word, and bits per byte. Each token is scored once, in a "
        "window that slides over its document; docs/evaluation.md has the definition.",
        epilog="example: torchrun --nproc-per-node 8 tools/perplexity.py --load checkpoints/350M --input valid.jsonl",
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Folder of checkpoints (the latest is taken), or one of them.")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--input", nargs="+", metavar="FILE", help="Files, folders or patterns: .jsonl, .txt, .parquet.")
    text.add_argument("--data-path", metavar="PREFIX", help="A tokenized dataset, PREFIX.bin and PREFIX.idx.")
    add("--json-key", default="text", metavar="KEY", help="Field of --input's lines (default: text).")
    add("--max-documents", type=COUNT, metavar="N", help="Only the first N documents.")
    add("--max-length", type=COUNT, metavar="N", help="Tokens of a window (default: the model's positions).")
    add("--stride", type=COUNT, metavar="N", help="Tokens by which a window moves on (default: half a window).")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="Windows of one forward pass (default: 8).")
    add("--expert-parallel", type=COUNT, default=1, metavar="N", help="Processes that share the experts (default: 1).")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is a GPU).")
    add_dtype_flag(parser)
    add("--output", metavar="FILE", help="Write the figures there, as JSON.")
    add_tokenizer_files(parser)
    args = parser.parse_args(argv)
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when checkpoint, tokenizer or text do not do; 2 for unusable flags."""
    args = parse_args(argv)  # before the heavy imports: --help and a wrong flag answer at once
    from megatron.checkpoint import CheckpointError
    from megatron.parallel.initialize import shut_down

    try:
        _measure(args)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shut_down()
    return 0


def _measure(args: argparse.Namespace) -> None:
    from megatron.evaluation.output import check_output, write_whole
    from megatron.evaluation.perplexity import documents_of_dataset, documents_of_files, measure, to_json
    from megatron.evaluation.processes import join, load_share
    from megatron.inference.load import DTYPES, choose_dtype, find_checkpoint, load_tokenizer
    from megatron.inference.special_tokens import special_tokens

    output = Path(args.output) if args.output else None
    if output and output.is_dir():
        raise ValueError(f"--output {output} is a folder; expected the name of a file")
    if output:
        check_output(output.parent, FIGURES)
    source = find_checkpoint(args.load)
    tokenizer = load_tokenizer(source, **tokenizer_files(args))
    if args.input:
        documents = documents_of_files(args.input, args.json_key, tokenizer)
    else:
        documents = documents_of_dataset(args.data_path, tokenizer)
    first = next(documents, None)  # a missing file is an error before anything is loaded
    if first is None:
        raise ValueError("there is no document in the text")
    documents = itertools.islice(itertools.chain([first], documents), args.max_documents)
    processes, device = join(args.device, args.expert_parallel)
    dtype = choose_dtype(args.dtype, device, source)
    model = load_share(source, processes, device, DTYPES[dtype])
    begin = special_tokens(source.meta, tokenizer).begin
    longest = args.max_length or model.config.position_rows
    stride = args.stride or max(1, longest // 2)
    found = measure(
        model, documents, begin, stride=stride, longest=longest, batch_size=args.batch_size, processes=processes
    )
    if processes.rank > 0:
        return
    text = to_json(found, checkpoint=str(source.path), dtype=dtype, max_length=longest, stride=stride)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
