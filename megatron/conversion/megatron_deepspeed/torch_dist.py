"""megatron.core's distributed checkpoints (--ckpt-format torch_dist): global tensors, cut into chunks.

FOLDER/metadata.json      that it is one
FOLDER/.metadata          shapes of tensors, and in which file each chunk is; a pickle of torch.distributed.checkpoint
FOLDER/__R_N.distcp       chunks, each as torch.save writes a tensor
FOLDER/common.pt          what is no tensor: Megatron's arguments

Layers that are all of one kind are one tensor, [layers, ...]; so are a layer's experts, [experts, ...].
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from megatron.checkpoint import Box, ShardedTensor
from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.storage import BoxLoadPlanner, stored_tensor
from megatron.checkpoint.tensors import dtype_name
from megatron.conversion.contents import Lazy
from megatron.conversion.megatron_deepspeed.core_names import from_core
from megatron.conversion.megatron_deepspeed.layouts import MegatronCheckpoint
from megatron.conversion.pickles import load_metadata, load_pickle, load_tensor
from megatron.conversion.shards import read_json

METADATA = ".metadata"
_COMMON, _KIND = "common.pt", "metadata.json"
_NOT_OF_MODEL = re.compile(r"(chained_\d+\.)*optimizer\..*|.*\._extra_state(/.*)?")
_ALL_LAYERS = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_CHUNKS_KEPT = 2  # of GroupedMLP, whose chunks have all experts of a rank: of both matrices


def find_distributed(where: Path) -> MegatronCheckpoint:
    """The tensors of a checkpoint; they stay on the disk until they are read, a chunk at a time.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors.
    """
    for name in (_KIND, _COMMON):
        if not (where / name).is_file():
            raise CheckpointError(f"{where} has {METADATA} but no {name}; expected megatron.core's format torch_dist")
    kind = read_json(where / _KIND)
    if (kind.get("sharded_backend"), kind.get("sharded_backend_version")) != ("torch_dist", 1):
        raise CheckpointError(
            f"{where / _KIND} says {kind.get('sharded_backend')!r} of version {kind.get('sharded_backend_version')}; "
            "'torch_dist' of version 1 is read here"
        )
    metadata, common = load_metadata(where / METADATA), load_pickle(where / _COMMON)
    shards = {}
    try:
        chunks = Chunks(where, metadata)
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and not _NOT_OF_MODEL.fullmatch(name):
                for layer, lazy in _by_layer(name, chunks, stored.size):
                    shards.update((new, [part]) for new, part in from_core(layer, lazy))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where / METADATA} cannot be used: {type(error).__name__}: {error}") from None
    version = float(common.get("checkpoint_version") or 0)
    return MegatronCheckpoint(where, common.get("args"), version, shards, core=True)


def _by_layer(name: str, chunks: "Chunks", shape: Sequence[int]) -> Iterator[tuple[str, Lazy]]:
    inside = re.sub(r"^(module\.|model\.)*", "", name)
    if match := _ALL_LAYERS.fullmatch(inside):
        for layer in range(shape[0]):
            yield f"decoder.layers.{layer}.{match[1]}", chunks.lazy(name, layer)
    else:
        yield inside, chunks.lazy(name)


class Chunks:
    """The tensors of a checkpoint, read by chunks as torch's FileSystemReader does, but with nothing unpickled freely;
    the last chunks are kept, because some are wanted row by row."""

    def __init__(self, where: Path, metadata: Metadata) -> None:
        self._where, self._metadata = where, metadata
        self._chunk = functools.lru_cache(_CHUNKS_KEPT)(self._read_chunk)
        files = {place.relative_path for place in (metadata.storage_data or {}).values()}
        if outside := sorted(file for file in files if Path(file).name != file):
            raise CheckpointError(f"{where / METADATA} names files of other folders: {some(outside)}; this is refused")
        if missing := sorted(file for file in files if not (where / file).is_file()):
            raise CheckpointError(f"{where} lacks {some(missing)}; copy the files of all ranks")

    def lazy(self, name: str, *index: int) -> Lazy:
        """A tensor, or its part under an index into the first dimensions; of either a row is read alone."""
        stored = stored_tensor(self._metadata, name)
        shape, dtype = tuple(stored.size), stored.properties.dtype

        def read(row: int | None) -> torch.Tensor:
            at = index if row is None else (*index, row)
            rest = shape[len(at) :]
            tensor = torch.empty((*(1 for _ in at), *rest), dtype=dtype)
            box = Box((*at, *(0 for _ in rest)), tensor)
            planner = BoxLoadPlanner({name: ShardedTensor(name, shape, dtype, [box])})
            planner.set_up_planner({}, self._metadata)
            self._fill(planner.create_local_plan(), planner)
            return tensor.view(rest)

        return Lazy(shape[len(index) :], dtype, read)

    def _fill(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        for item in plan.items:
            begins = zip(item.storage_offsets, item.lengths, strict=True)
            chunk = self._chunk(item.storage_index)[tuple(slice(begin, begin + size) for begin, size in begins)]
            into = planner.resolve_tensor(item)
            if chunk.shape != item.lengths or chunk.dtype != into.dtype:
                raise CheckpointError(
                    f"{self._where}: {item.storage_index.fqn} has a chunk of {dtype_name(chunk.dtype)} "
                    f"{list(chunk.shape)}, where {METADATA} says {dtype_name(into.dtype)} {list(item.lengths)}; copy "
                    "the files again"
                )
            into.copy_(chunk)

    def _read_chunk(self, index: MetadataIndex) -> torch.Tensor:
        place: Any = self._metadata.storage_data.get(index)
        if place is None:
            raise CheckpointError(f"{self._where / METADATA} does not tell where {index.fqn} is; copy the file again")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self._where}: {index.fqn} is stored as {place.transform_descriptors}, not plainly")
        return load_tensor(self._where / place.relative_path, place.offset, place.length)
