"""One conversion from beginning to end: read, change, write."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.contents import MODEL, Contents, Lazy, some, without_optimizer
from megatron.checkpoint.formats.hf import is_hf, read_hf, write_hf
from megatron.checkpoint.formats.hf_tokenizer import FILES, files_of
from megatron.checkpoint.formats.native import read_native, write_native
from megatron.checkpoint.formats.shards import parse_size
from megatron.checkpoint.formats.upcycle import upcycle
from megatron.config import MoEConfig
from megatron.data.tokenizer import Tokenizer
from megatron.inference.load import Source, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What to do; the fields are the flags of tools/convert_checkpoint.py."""

    load: list[str]
    save: str
    target: str
    source: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    drop_optimizer: bool = False
    reset_clock: bool = False
    upcycle: bool = False
    num_experts: list[int] | None = None
    expert_interval: int = 2
    topk: int = 1
    mlp_type: str = "standard"
    expert_noise: float = 0.0
    seed: int = 1234
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
    sources = [read(job, folder) for folder in job.load]
    contents = sources[0]
    if contents.has_optimizer and (job.drop_optimizer or job.target == "hf" or len(sources) > 1):
        left_out = [name for name in contents.tensors if not name.startswith(MODEL)]
        yield f"left out: the optimizer's state, {len(left_out)} tensors"
        sources = [without_optimizer(source) for source in sources]
        contents = sources[0]
    if len(sources) > 1:
        contents = average(sources)
    if job.upcycle:
        moe = MoEConfig(tuple(job.num_experts or ()), job.expert_interval, job.topk, job.mlp_type)
        contents = upcycle(contents, moe, job.expert_noise, job.seed)
    if job.reset_clock:
        clock = contents.meta["clock"] | {"samples": 0, "steps": 0, "skipped": 0}
        contents = dataclasses.replace(contents, meta=contents.meta | {"clock": clock}, step=0)
    if job.dtype is not None:
        contents = cast(contents, DTYPES[job.dtype])
    total = sum(lazy.bytes for lazy in contents.tensors.values())
    yield f"{contents.where}: {len(contents.tensors)} tensors, {total / 1e9:.3f} GB"
    if job.target == "hf":
        tokenizer, files = tokenizer_of(contents, job.tokenizer_options)
        written = write_hf(contents, job.save, tokenizer, files, shard)
    else:
        written = write_native(contents, job.save)
    yield f"wrote {written}"


def read(job: Conversion, folder: str) -> Contents:
    """What ``folder``, one of ``job.load``, holds."""
    source = job.source or ("hf" if is_hf(folder) else "native")
    return read_hf(folder, job.tokenizer_options) if source == "hf" else read_native(folder)


def average(sources: list[Contents]) -> Contents:
    """The mean of several checkpoints' weights, computed in fp32; the rest is the first one's.

    Raises:
        CheckpointError: they are of different models.
    """
    first = sources[0]
    for other in sources[1:]:
        differing = [
            name
            for name in sorted(first.tensors.keys() | other.tensors.keys())
            if name not in first.tensors
            or name not in other.tensors
            or first.tensors[name].shape != other.tensors[name].shape
        ]
        if differing or other.meta["tokenizer"] != first.meta["tokenizer"]:
            what = f"in {some(differing)}" if differing else "in their tokenizers"
            raise CheckpointError(f"{first.where} and {other.where} differ {what}; only equal models can be averaged")

    def mean(name: str) -> Lazy:
        lazies = [source.tensors[name] for source in sources]
        dtype = lazies[0].dtype

        def read(row: int | None) -> torch.Tensor:
            total = lazies[0].read(row).float()
            for lazy in lazies[1:]:
                total = total + lazy.read(row).float()
            return (total / len(lazies)).to(dtype)

        return Lazy(lazies[0].shape, dtype, read)

    origin = {"format": "average", "folders": [source.where for source in sources]}
    return dataclasses.replace(
        first, tensors={name: mean(name) for name in first.tensors}, meta=first.meta | {"origin": origin}
    )


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
