"""The tokenizer's flags, for tools that take no others of a run's."""

import argparse
import dataclasses

from megatron.config.data import DataConfig

_FIELDS = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "eod_token")


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add a group with the flags that a training run has for its tokenizer."""
    group = parser.add_argument_group("tokenizer")
    for field in dataclasses.fields(DataConfig):
        if field.name in _FIELDS:
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                default=field.default,
                help=f"{field.metadata['help']} (default: {field.default})",
                choices=field.metadata["choices"],
                metavar=field.metadata["metavar"],
            )


def tokenizer_config(args: argparse.Namespace) -> DataConfig:
    """What the flags say."""
    return DataConfig(**{name: getattr(args, name) for name in _FIELDS})
