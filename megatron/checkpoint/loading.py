"""Load a checkpoint in whatever layout: everything is verified before the first destination changes."""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron.checkpoint.agree import Coordinator, raise_failures
from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.folder import META, Manifest, damage, in_use, latest, load_instead, read_manifest
from megatron.checkpoint.storage import BoxLoadPlanner, Reader, read_index, stored_tensor
from megatron.checkpoint.tensors import ShardedTensor, by_name, dtype_name

_HASHING_THREADS = 4


def load(
    folder: str | os.PathLike,
    entries: Sequence[ShardedTensor],
    group: dist.ProcessGroup | None = None,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Fill the boxes of ``entries`` from a checkpoint. All ranks of ``group`` call it together.

    Each rank reads only what lies in its own boxes. Stored and wanted floating-point types may differ: values are cast.

    Args:
        folder: a run's folder (its latest checkpoint is taken) or one checkpoint's own folder; the first rank's counts.
        entries: the destinations; an entry without boxes asks only that the tensor is there.
        group: a process group, best on a CPU backend; None is the default group, or this process alone if
            torch.distributed is not initialised.
        strict: whether the checkpoint must hold no tensor beyond those that the ranks together ask for.

    Returns:
        The metadata it was saved with.

    Raises:
        CheckpointError: on every rank, with the same message: there is no checkpoint; a file is missing or damaged; a
            tensor is missing, unexpected or of another shape. No destination was changed, unless the message says that
            reading failed after verification: then they hold no usable values.
    """
    ranks = Coordinator(group)
    checkpoint = ranks.first(lambda: _find(folder))
    with in_use(checkpoint) if ranks.rank == 0 else contextlib.nullcontext():
        _verify(checkpoint, ranks)
        wanted = ranks.each(lambda: by_name(entries, exact_dtype=False))
        index, meta = ranks.each(lambda: (read_index(checkpoint), _parse_meta(checkpoint)))
        _match(checkpoint, wanted, index, ranks, strict)
        try:
            state_dict_loader.load(
                {},
                storage_reader=Reader(checkpoint, index),
                planner=BoxLoadPlanner(wanted),
                process_group=ranks.process_group,
                no_dist=not ranks.distributed,
            )
        except CheckpointException as error:
            raise_failures(
                {rank: str(failure) for rank, (failure, _) in error.failures.items()},
                ranks.size,
                f"checkpoint {checkpoint} was verified, but reading failed; the tensors to be loaded are not usable: ",
            )
    return meta


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint (of the latest one, if ``folder`` is a run's folder), without its tensors.

    Raises:
        CheckpointError: there is no checkpoint, or the file is missing or damaged.
    """
    checkpoint = _find(folder)
    record = read_manifest(checkpoint).files.get(META)
    problem = f"{META} is not in its manifest" if record is None else damage(checkpoint, META, record)
    if problem:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {problem}. {load_instead(checkpoint)}")
    return _parse_meta(checkpoint)


def _find(folder: str | os.PathLike) -> Path:
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"there is no checkpoint in {folder}; give a folder that a run saved to")
    return checkpoint


def _parse_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / META).read_bytes())


def _verify(checkpoint: Path, ranks: Coordinator) -> None:
    """Compare every file with the manifest; the ranks share the work."""

    def check() -> list[str]:
        manifest = read_manifest(checkpoint)
        mine = _share(manifest, ranks.rank, ranks.size)
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            found = pool.map(lambda name: damage(checkpoint, name, manifest.files[name]), mine)
            return [problem for problem in found if problem]

    problems = sorted(itertools.chain.from_iterable(ranks.gather(check)))
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {some(problems)}. Nothing was loaded. "
            + ranks.first(lambda: load_instead(checkpoint))
        )


def _share(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """The files that ``rank`` verifies: the biggest first, each to the rank with the least to read so far."""
    load = [0] * min(world_size, max(1, len(manifest.files)))
    mine = []
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
        least = load.index(min(load))
        load[least] += record.size
        if least == rank:
            mine.append(name)
    return mine


def _match(
    checkpoint: Path, wanted: Mapping[str, ShardedTensor], index: Metadata, ranks: Coordinator, strict: bool
) -> None:
    """Compare what the ranks want with what the checkpoint holds."""
    known = index.state_dict_metadata

    def compare() -> tuple[list[str], list[str], bytes]:
        missing = [name for name in wanted if name not in known]
        unfit = []
        for name, entry in wanted.items():
            if name in known:
                stored = stored_tensor(index, name)
                shape, dtype = tuple(stored.size), stored.properties.dtype
                if shape != entry.global_shape:
                    unfit.append(f"{name} is {list(shape)}, wanted {list(entry.global_shape)}")
                elif any(dtype.is_floating_point != box.tensor.dtype.is_floating_point for box in entry.boxes):
                    unfit.append(f"{name} is {dtype_name(dtype)}, wanted {dtype_name(entry.boxes[0].tensor.dtype)}")
        return missing, unfit, bytes(name in wanted for name in known)

    compared = ranks.gather(compare)
    asked_for = [any(marks) for marks in zip(*(seen for _, _, seen in compared), strict=True)]
    problems = {
        "missing from it": sorted({name for missing, _, _ in compared for name in missing}),
        "of another shape or type": sorted({what for _, unfit, _ in compared for what in unfit}),
        "in it but not wanted": [name for name, asked in zip(known, asked_for, strict=True) if strict and not asked],
    }
    if any(problems.values()):
        told = [f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names]
        raise CheckpointError(
            f"checkpoint {checkpoint} holds other tensors than are wanted: {', '.join(told)}. Nothing was loaded. Load "
            "it into the model it was saved from: the configuration is in its meta.json"
        )
