"""One conversion from beginning to end: read, change, write."""

import contextlib
from collections.abc import Iterator

from megatron.config import MoEConfig
from megatron.conversion.changes import average, cast
from megatron.conversion.contents import Contents, optimizer_tensors, without_optimizer
from megatron.conversion.formats import FORMATS, Format, format_of
from megatron.conversion.job import MOE_OPTIONS, UPCYCLING, Conversion
from megatron.conversion.output import check_free
from megatron.conversion.shards import parse_size
from megatron.conversion.upcycle import upcycle
from megatron.inference.load import DTYPES


def convert(job: Conversion) -> Iterator[str]:
    """Do it; yields what to tell, a line at a time.

    Raises:
        CheckpointError, ValueError: something does not fit; the message says what, where and how to mend it.
    """
    target = FORMATS[job.target]
    _check_options(job, target)
    check_free(job.save)
    with contextlib.ExitStack() as held:
        contents = read(job, held)
        changed = change(contents, job, target)
        states = optimizer_tensors(contents.tensors)
        total = sum(lazy.bytes for lazy in changed.tensors.values())
        yield from contents.notes
        yield f"{changed.where}: {len(changed.tensors)} tensors, {total / 1e9:.3f} GB"
        if states and not changed.has_optimizer:
            yield f"left out: the optimizer's state, {len(states)} tensors"
        written = yield from target.write(changed, job)
    yield f"wrote {written}"


def _check_options(job: Conversion, target: Format) -> None:
    """Raises ValueError for an option that would have no effect, or that cannot be read."""
    without = [f"--{name.replace('_', '-')}" for name in UPCYCLING if getattr(job, name) is not None]
    if without and not job.upcycle:
        raise ValueError(f"{', '.join(without)}: of --upcycle, which gives a dense model experts; add it, or drop them")
    if job.max_shard_size is not None:
        if "max_shard_size" not in target.write_options:
            raise ValueError(f"--max-shard-size has no meaning for --to {job.target}; drop it")
        parse_size(job.max_shard_size)


def read(job: Conversion, held: contextlib.ExitStack) -> Contents:
    """What ``job.load`` holds, or the average of ``job.average``.

    Tensors are read later. Until ``held`` is closed, a run that goes on does not delete its checkpoint as too old.
    """
    if job.average is None:
        if job.load is None:
            raise ValueError("nothing to convert; give --load or --average")
        return _read_one(job, job.load, held)
    if len(job.average) < 2:
        raise ValueError(f"--average {' '.join(job.average)}: give two checkpoints or more")
    return average([_read_one(job, folder, held) for folder in job.average])


def _read_one(job: Conversion, folder: str, held: contextlib.ExitStack) -> Contents:
    source = FORMATS[job.source] if job.source else format_of(folder)
    if job.gelu_as_tanh and "gelu_as_tanh" not in source.read_options:
        raise ValueError(f"--gelu-as-tanh has no meaning for {folder}, of format {source.name}; drop it")
    return source.read(folder, job, held)


def change(contents: Contents, job: Conversion, target: Format) -> Contents:
    """What is to be written."""
    if contents.has_optimizer and (job.drop_optimizer or not target.keeps_optimizer):
        contents = without_optimizer(contents)
    if job.upcycle:
        given = {name: getattr(job, name) for name in MOE_OPTIONS if getattr(job, name) is not None}
        moe = MoEConfig(num_experts=tuple(job.num_experts or (1,)), **given)
        contents = upcycle(contents, moe, job.upcycle_noise or 0.0, job.upcycle_seed or 0)
    contents = target.for_layout(contents, job)
    return contents if job.dtype is None else cast(contents, DTYPES[job.dtype])
