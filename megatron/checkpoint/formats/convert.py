"""One conversion from beginning to end: read, change, write."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.folder import in_use, latest
from megatron.checkpoint.formats.changes import average, cast, for_layout
from megatron.checkpoint.formats.contents import MOMENTS, Contents, without_optimizer
from megatron.checkpoint.formats.hf import is_hf, read_hf, write_hf
from megatron.checkpoint.formats.hf_extras import KEY, names
from megatron.checkpoint.formats.hf_tokenizer import FILES, files_of
from megatron.checkpoint.formats.megatron_deepspeed import (
    is_megatron_deepspeed,
    is_megatron_lm,
    no_place,
    read_megatron_deepspeed,
    read_megatron_lm,
    write_megatron_deepspeed,
)
from megatron.checkpoint.formats.native import read_native, write_native
from megatron.checkpoint.formats.output import check_free
from megatron.checkpoint.formats.shards import parse_size
from megatron.checkpoint.formats.upcycle import upcycle
from megatron.config import MoEConfig
from megatron.data.tokenizer import Tokenizer
from megatron.inference.load import DTYPES, Source, load_tokenizer

MEGATRON_DEEPSPEED, MEGATRON_LM = "megatron-deepspeed", "megatron-lm"
MOE_OPTIONS = ("expert_interval", "topk", "mlp_type")
UPCYCLING = ("num_experts", *MOE_OPTIONS, "upcycle_noise", "upcycle_seed")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What to do; the fields are the flags of tools/convert_checkpoint.py."""

    load: str | None
    save: str
    target: str
    source: str | None = None
    average: list[str] | None = None
    dtype: str | None = None
    drop_optimizer: bool = False
    gelu_as_tanh: bool = False
    tp: int | None = None
    pp: int | None = None
    ep: list[int] | None = None
    upcycle: bool = False
    num_experts: list[int] | None = None
    expert_interval: int | None = None
    topk: int | None = None
    mlp_type: str | None = None
    upcycle_noise: float | None = None
    upcycle_seed: int | None = None
    max_shard_size: str | None = None
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_model: str | None = None
    eod_token: str | None = None

    @property
    def tokenizer_options(self) -> dict[str, str]:
        """The tokenizer's flags that were given."""
        names = ("tokenizer_type", *FILES, "eod_token")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def convert(job: Conversion) -> Iterator[str]:
    """Do it; yields what to tell, a line at a time.

    Raises:
        CheckpointError, ValueError: something does not fit; the message says what, where and how to mend it.
    """
    _check_options(job)
    shard = parse_size(job.max_shard_size or "5GB")
    check_free(job.save)
    with contextlib.ExitStack() as held:
        contents = read(job, held)
        changed = change(contents, job)
        moments = [name for name in contents.tensors if name.startswith(MOMENTS)]
        total = sum(lazy.bytes for lazy in changed.tensors.values())
        yield from contents.notes
        yield f"{changed.where}: {len(changed.tensors)} tensors, {total / 1e9:.3f} GB"
        if moments and not changed.has_optimizer:
            yield f"left out: the optimizer's state, {len(moments)} tensors"
        if job.target == "hf":
            tokenizer, files = tokenizer_of(changed, job.tokenizer_options)
            written = write_hf(changed, job.save, tokenizer, files, shard)
        elif job.target == MEGATRON_DEEPSPEED:
            if options := no_place(changed.config.moe):
                yield f"left out, of training: {', '.join(options)}; Megatron-DeepSpeed has no such arguments"
            if extras := names(changed.meta.get(KEY) or {}):
                yield f"left out, of Hugging Face: {', '.join(extras)}; Megatron-DeepSpeed has no place for them"
            written = write_megatron_deepspeed(changed, job.save)
        else:
            written = write_native(changed, job.save)
    yield f"wrote {written}"


def _check_options(job: Conversion) -> None:
    """Raises ValueError for an option that would have no effect."""
    without = [f"--{name.replace('_', '-')}" for name in UPCYCLING if getattr(job, name) is not None]
    if without and not job.upcycle:
        raise ValueError(f"{', '.join(without)}: of --upcycle, which gives a dense model experts; add it, or drop them")
    if job.max_shard_size is not None and job.target != "hf":
        raise ValueError(f"--max-shard-size has no meaning for --to {job.target}; drop it")


def read(job: Conversion, held: contextlib.ExitStack) -> Contents:
    """What ``job.load`` holds, or the average of ``job.average``.

    Tensors are read later. Until ``held`` is closed, a run that goes on does not delete its checkpoint as too old.
    """
    if job.average is None:
        return _read_one(job, job.load, held)
    if len(job.average) < 2:
        raise ValueError(f"--average {' '.join(job.average)}: give two checkpoints or more")
    return average([_read_one(job, folder, held) for folder in job.average])


def _read_one(job: Conversion, folder: str, held: contextlib.ExitStack) -> Contents:
    source = job.source or _format_of(folder)
    if job.gelu_as_tanh and source in ("native", "hf"):
        raise ValueError(f"--gelu-as-tanh has no meaning for {folder}, of format {source}; drop it")
    if source == "native":
        found = latest(folder) if Path(folder).is_dir() else None
        if found is not None:
            held.enter_context(in_use(found))
        return _with_tokenizer(read_native(found or folder), job.tokenizer_options)
    if source == "hf":
        return read_hf(folder, job.tokenizer_options)
    read = read_megatron_lm if source == MEGATRON_LM else read_megatron_deepspeed
    return read(folder, job.tokenizer_options, job.gelu_as_tanh)


def _with_tokenizer(contents: Contents, moved: dict[str, str]) -> Contents:
    """The same checkpoint, whose configuration says that the tokenizer's files are where ``moved`` does."""
    if not moved:
        return contents
    _, files = tokenizer_of(contents, moved)
    config = contents.meta["config"]
    data = config["data"] | {option: str(Path(file).absolute()) for option, file in files.items()}
    return dataclasses.replace(contents, meta=contents.meta | {"config": config | {"data": data}})


def _format_of(folder: str) -> str:
    if is_hf(folder):
        return "hf"
    if is_megatron_deepspeed(folder):  # first: it may have Megatron-LM's latest_checkpointed_iteration.txt too
        return MEGATRON_DEEPSPEED
    return MEGATRON_LM if is_megatron_lm(folder) else "native"


def change(contents: Contents, job: Conversion) -> Contents:
    """What is to be written."""
    if contents.has_optimizer and (job.drop_optimizer or job.target != "native"):
        contents = without_optimizer(contents)
    if job.upcycle:
        given = {name: getattr(job, name) for name in MOE_OPTIONS if getattr(job, name) is not None}
        moe = MoEConfig(num_experts=tuple(job.num_experts or (1,)), **given)
        contents = upcycle(contents, moe, job.upcycle_noise or 0.0, job.upcycle_seed or 0)
    if any(size is not None for size in (job.tp, job.pp, job.ep)):
        if job.target == "hf":
            raise ValueError("--tp, --pp and --ep have no meaning for --to hf, whose files know no layout; drop them")
        if job.target == MEGATRON_DEEPSPEED and (job.pp, job.ep) != (None, None):
            raise ValueError(
                "--pp and --ep have no meaning for --to megatron-deepspeed: one stage is written, and files that any "
                "expert-parallel degree loads; drop them"
            )
        sizes = (1 if size is None else size for size in (job.tp, job.pp))
        contents = for_layout(contents, *sizes, job.ep or [1])
    elif job.target == MEGATRON_DEEPSPEED:  # the layout of the run that saved it is not that of the files
        contents = for_layout(contents, 1, 1, [1])
    return contents if job.dtype is None else cast(contents, DTYPES[job.dtype])


def tokenizer_of(contents: Contents, moved: dict[str, str]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that a checkpoint was trained with, and its files.

    Raises:
        ValueError: a file is missing, or is not the one of the training run.
    """
    moved = dict(contents.tokenizer_files) | moved
    tokenizer = load_tokenizer(Source(Path(contents.where), contents.config, contents.meta), **moved)
    return tokenizer, files_of(dataclasses.replace(contents.config.data, **moved))
