"""Flags that the tools which run a trained model have in common."""

import argparse

TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="Number format of the model (default: fp32 on a CPU, that of the training run on a GPU).",
    )


def add_tokenizer_files(
    parser: argparse.ArgumentParser, about: str = "Where its files are now, if they moved since training."
) -> argparse._ArgumentGroup:
    """Add a group with the flags of :func:`tokenizer_files`; returns it."""
    group = parser.add_argument_group("tokenizer", about)
    for name in TOKENIZER_FILES:
        group.add_argument("--" + name.replace("_", "-"), metavar="FILE")
    return group


def tokenizer_files(args: argparse.Namespace) -> dict[str, str | None]:
    """The tokenizer's files by option; None for what was not given."""
    return {name: getattr(args, name) for name in TOKENIZER_FILES}


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with an error unless each of these options is 1 or more, or was not given."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least 1")
