"""One conversion from beginning to end: read, change, write."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.checkpoint.formats.contents import MODEL, Contents, without_optimizer
from megatron.checkpoint.formats.hf import is_hf, read_hf, write_hf
from megatron.checkpoint.formats.hf_tokenizer import FILES, files_of
from megatron.checkpoint.formats.native import read_native, write_native
from megatron.checkpoint.formats.shards import parse_size
from megatron.data.tokenizer import Tokenizer
from megatron.inference.load import Source, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What to do; the fields are the flags of tools/convert_checkpoint.py."""

    load: str
    save: str
    target: str
    source: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_model: str | None = None

    @property
    def tokenizer_options(self) -> dict[str, str]:
        """The tokenizer's flags that were given."""
        names = ("tokenizer_type", *FILES)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def convert(job: Conversion) -> Iterator[str]:
    """Do it; yields what to tell, a line at a time.

    Raises:
        CheckpointError, ValueError: something does not fit; the message says what, where and how to mend it.
    """
    shard = parse_size(job.max_shard_size)
    contents = read(job)
    dropped = []
    if job.target == "hf" and contents.has_optimizer:
        dropped = [name for name in contents.tensors if not name.startswith(MODEL)]
        contents = without_optimizer(contents)
    if job.dtype is not None:
        contents = cast(contents, DTYPES[job.dtype])
    total = sum(lazy.bytes for lazy in contents.tensors.values())
    yield f"{contents.where}: {len(contents.tensors)} tensors, {total / 1e9:.3f} GB"
    if dropped:
        yield f"left out: the optimizer's state, {len(dropped)} tensors"
    if job.target == "hf":
        tokenizer, files = tokenizer_of(contents, job.tokenizer_options)
        written = write_hf(contents, job.save, tokenizer, files, shard)
    else:
        written = write_native(contents, job.save)
    yield f"wrote {written}"


def read(job: Conversion) -> Contents:
    """What ``job.load`` holds."""
    source = job.source or ("hf" if is_hf(job.load) else "native")
    if source == "hf":
        return read_hf(job.load, job.tokenizer_options)
    return read_native(job.load)


def cast(contents: Contents, dtype: torch.dtype) -> Contents:
    """The weights in another number format; an optimizer's state stays as it is."""
    tensors = {
        name: lazy.map(lambda tensor: tensor.to(dtype), dtype) if name.startswith(MODEL) else lazy
        for name, lazy in contents.tensors.items()
    }
    return dataclasses.replace(contents, tensors=tensors)


def tokenizer_of(contents: Contents, moved: dict[str, str]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that a checkpoint was trained with, and its files.

    Raises:
        ValueError: a file is missing, or is not the one of the training run.
    """
    moved = dict(contents.tokenizer_files) | moved
    tokenizer = load_tokenizer(Source(Path(contents.where), contents.config, contents.meta), **moved)
    return tokenizer, files_of(dataclasses.replace(contents.config.data, **moved))
