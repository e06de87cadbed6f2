"""Our own checkpoints, read one tensor at a time and written from such tensors."""

import os
import platform
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron.checkpoint import Box, CheckpointError, Deferred, ShardedTensor, latest, save
from megatron.checkpoint.coverage import coverage_problems
from megatron.checkpoint.errors import some
from megatron.checkpoint.folder import INDEX, META, damage, load_instead, read_manifest
from megatron.checkpoint.loading import read_meta
from megatron.checkpoint.storage import BoxLoadPlanner, Reader, read_index, stored_tensor
from megatron.conversion.contents import Contents, Lazy, is_stacked
from megatron.conversion.output import staged

TOKENIZER_FOLDER = "tokenizer"
_HASHING_THREADS = 4


def read_native(folder: str | os.PathLike, verify: bool = True) -> Contents:
    """The latest checkpoint of ``folder``, or the one that it is.

    Every file is compared with its checksum, and its header with the index; without ``verify``, only what describes the
    tensors is read.

    Raises:
        CheckpointError: there is none, it is damaged, or its tensors are not those of its configuration.
    """
    path = latest(folder) if Path(folder).is_dir() else None
    if path is None:
        what = "holds no finished checkpoint" if Path(folder).exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; expected the --save folder of a training run or one checkpoint in it")
    manifest = read_manifest(path)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        names = [name for name in sorted(manifest.files) if verify or name in (META, INDEX)]
        checked = pool.map(lambda name: damage(path, name, manifest.files[name]), names)
        problems = [problem for problem in checked if problem]
    problems += [f"{name} is not in its manifest" for name in (META, INDEX) if name not in manifest.files]
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {some(problems)}. Nothing was written. {load_instead(path)}"
        )
    index = read_index(path)
    if verify:
        unknown = sorted(file.name for file in path.glob("*.safetensors") if file.name not in manifest.files)
        problems = [f"{name} is not in its manifest" for name in unknown] + coverage_problems(path, index)
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is not sound: {some(problems)}. Nothing was written. {load_instead(path)}"
        )
    tensors = {name: _lazy(path, index, name) for name in index.state_dict_metadata}
    return Contents(str(path), read_meta(path), tensors, manifest.step).check()


def _lazy(path: Path, index: Metadata, name: str) -> Lazy:
    stored = stored_tensor(index, name)
    shape, dtype = tuple(stored.size), stored.properties.dtype

    def read(row: int | None) -> torch.Tensor:
        offsets = (0,) * len(shape) if row is None else (row, *(0 for _ in shape[1:]))
        tensor = torch.empty(shape if row is None else (1, *shape[1:]), dtype=dtype)
        planner = BoxLoadPlanner({name: ShardedTensor(name, shape, dtype, [Box(offsets, tensor)])})
        planner.set_up_planner({}, index)
        Reader(path, index).read_data(planner.create_local_plan(), planner)
        return tensor if row is None else tensor[0]

    return Lazy(shape, dtype, read)


def new_meta(
    config: dict[str, Any], vocab_size: int, tokenizer: Mapping[str, Any], seq_length: int, origin: dict[str, Any]
) -> dict[str, Any]:
    """The metadata of a model that came from elsewhere: a run at its start, without optimizer state.

    Args:
        config: as :func:`megatron.config.run.to_dict` gives it.
        vocab_size: rows of the token table.
        tokenizer: its ``vocab_size`` and ``fingerprint``.
        seq_length: of the clock.
        origin: what it was converted from, for people to read.
    """
    return {
        "clock": {"seq_length": seq_length, "samples": 0, "steps": 0, "skipped": 0},
        "config": config,
        "vocab_size": vocab_size,
        "tokenizer": dict(tokenizer),
        "optimizer": None,
        "world_size": 1,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "origin": origin,
    }


def write_native(contents: Contents, folder: str | os.PathLike) -> Path:
    """Write a checkpoint that a training run can load. Memory holds one tensor at a time, of experts one expert.

    Tokenizer files that the run's configuration does not know are copied into ``folder/tokenizer``.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: ``folder`` is taken, the disk is too small, or reading failed; nothing is left behind.
    """
    contents.check()
    final = Path(folder).resolve()
    meta = contents.meta
    with staged(folder, sum(lazy.bytes for lazy in contents.tensors.values())) as temporary:
        if contents.tokenizer_files:
            (temporary / TOKENIZER_FOLDER).mkdir()
            data = dict(meta["config"]["data"])
            for field, file in contents.tokenizer_files.items():
                shutil.copy(file, temporary / TOKENIZER_FOLDER / Path(file).name)
                data[field] = str(final / TOKENIZER_FOLDER / Path(file).name)
            meta = meta | {"config": meta["config"] | {"data": data}}
        written = save(temporary, contents.step, [_entry(name, lazy) for name, lazy in contents.tensors.items()], meta)
    return final / written.name


def _entry(name: str, lazy: Lazy) -> ShardedTensor:
    if is_stacked(name):
        one = (1, *lazy.shape[1:])
        rest = (0,) * len(lazy.shape[1:])
        boxes = [Box((row, *rest), _deferred(lazy, row, one)) for row in range(lazy.shape[0])]
    else:
        boxes = [Box((0,) * len(lazy.shape), _deferred(lazy, None, lazy.shape))]
    return ShardedTensor(name, lazy.shape, lazy.dtype, boxes)


def _deferred(lazy: Lazy, row: int | None, shape: tuple[int, ...]) -> Deferred:
    return Deferred(torch.Size(shape), lazy.dtype, lambda: lazy.read(row).view(shape))
