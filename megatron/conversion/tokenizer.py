"""The tokenizer that a checkpoint was trained with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from megatron.conversion.contents import Contents
from megatron.conversion.hf_tokenizer import files_of
from megatron.data.tokenizer import Tokenizer
from megatron.inference.load import ModelCheckpoint, load_tokenizer


def tokenizer_of(contents: Contents, moved: Mapping[str, str]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that a checkpoint was trained with, and its files.

    Args:
        contents: the checkpoint.
        moved: options of the tokenizer's files that are elsewhere now.

    Raises:
        ValueError: a file is missing, or is not the one of the training run.
    """
    moved = dict(contents.tokenizer_files) | dict(moved)
    tokenizer = load_tokenizer(ModelCheckpoint(Path(contents.where), contents.config, contents.meta), **moved)
    return tokenizer, files_of(dataclasses.replace(contents.config.data, **moved))


def with_tokenizer(contents: Contents, moved: Mapping[str, str]) -> Contents:
    """The same checkpoint, whose configuration says that the tokenizer's files are where ``moved`` does."""
    if not moved:
        return contents
    _, files = tokenizer_of(contents, moved)
    config = contents.meta["config"]
    data = config["data"] | {option: str(Path(file).absolute()) for option, file in files.items()}
    return dataclasses.replace(contents, meta=contents.meta | {"config": config | {"data": data}})
