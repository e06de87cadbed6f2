"""Our side of torch.distributed.checkpoint: planners over ShardedTensor boxes, and the files they go to.

torch.distributed.checkpoint decides which rank writes and reads which box, drops replicas, and makes a failure on one
rank a failure on all. Its own file format is not used: there the metadata is a pickle, and a box is read whole where a
slice is wanted. Ours are safetensors files with a JSON index, so that loading runs no code from a file and reads only
the slices a rank needs.

Everything used of torch.distributed.checkpoint is its documented interface, except the two things that
``tests/checkpoint/test_storage.py`` watches: ``DefaultSavePlanner.create_global_plan`` works on any plan of SHARD items
and drops duplicates, and ``planner_helpers.create_read_items_for_chunk_list`` computes overlaps.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.folder import (
    INDEX,
    META,
    CheckpointStatus,
    FileRecord,
    begin,
    commit,
    temporary_path,
    write_file,
)
from megatron.checkpoint.tensors import DTYPES, Deferred, ShardedTensor, by_name, data_of, dtype_name, dtype_of

# said by every save and load of a process on its own, for which it is meant here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Exceptions travel between ranks as pickles: let only one go that surely survives it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from None


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


# ------------------------------------------------------------------------------------------------- saving


class BoxSavePlanner(DefaultSavePlanner):
    """Plans the writing of what ``entries()`` returns; called late, so that a failure in it reaches all ranks."""

    def __init__(self, entries: Callable[[], Sequence[ShardedTensor]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries = entries
        self._boxes: dict[MetadataIndex, torch.Tensor | Deferred] = {}

    def create_local_plan(self) -> SavePlan:
        """A write item for every box of this rank; with them travels what the rank knows of each tensor."""
        items, kinds = [], {}
        with _in_words():
            for name, entry in by_name(self._entries(), exact_dtype=True).items():
                kinds[name] = (entry.global_shape, dtype_name(entry.dtype))
                for offsets, tensor in entry.boxes:
                    index = MetadataIndex(name, offsets)
                    self._boxes[index] = tensor
                    data = TensorWriteData(
                        ChunkStorageMetadata(torch.Size(offsets), tensor.shape),
                        TensorProperties(dtype=entry.dtype),
                        torch.Size(entry.global_shape),
                    )
                    items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        items.sort(key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # keeps each aligned in the file
        return SavePlan(items, planner_data=kinds)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Drop replicas, and check that the ranks agree and that each tensor is covered once."""
        with _in_words():
            kinds: dict[str, tuple[tuple[int, ...], str]] = {}
            sizes: dict[MetadataIndex, torch.Size] = {}
            for rank, plan in enumerate(all_plans):
                sizes |= {item.index: item.tensor_data.chunk.sizes for item in plan.items if item.tensor_data}
                for name, kind in plan.planner_data.items():
                    if kinds.setdefault(name, kind) != kind:
                        raise CheckpointError(f"{name} is {kind} to rank {rank}, but {kinds[name]} to another one")
            covered = dict.fromkeys(kinds, 0)
            for index, size in sizes.items():
                covered[index.fqn] += math.prod(size)
            wrong = [
                f"{name} has {math.prod(shape)} elements, its boxes {covered[name]}"
                for name, (shape, _) in kinds.items()
                if covered[name] != math.prod(shape)
            ]
            if wrong:
                raise CheckpointError(
                    "the boxes of all ranks must cover each tensor exactly once, but those of "
                    f"{len(wrong)} of {len(kinds)} tensors do not: {'; '.join(wrong[:5])}"
                )
            return super().create_global_plan([dataclasses.replace(plan, planner_data=None) for plan in all_plans])

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor | Deferred:
        """The data of one box."""
        return self._boxes[index]


@dataclasses.dataclass(frozen=True)
class _DataFile:
    """What each write result carries: the file it is in."""

    name: str
    record: FileRecord


class Writer(StorageWriter):
    """Writes one safetensors file a rank into a temporary folder; the coordinator then commits the checkpoint."""

    def __init__(
        self, folder: Path, step: int, meta: dict[str, Any], status: CheckpointStatus = CheckpointStatus.CONFIRMED
    ) -> None:
        self._folder, self._step, self._meta, self._status = folder, step, meta, status
        self._temporary = Path()

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to do: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the temporary folder and tell each rank its file."""
        with _in_words():
            json.dumps(self._meta)
            temporary = begin(self._folder, self._step)
        return [
            dataclasses.replace(plan, storage_data=temporary / f"data-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this rank's file. A rank without anything to write has none."""
        if not plan.items:
            return _done([])
        with _in_words():
            path: Path = plan.storage_data
            path.parent.mkdir(exist_ok=True)  # made by rank 0; a network file system may not show it yet
            boxes = [(box_key(item.index), planner.resolve_data(item)) for item in plan.items]
            file = _DataFile(path.name, write_safetensors(path, boxes))
        sizes = [tensor.numel() * tensor.element_size() for _, tensor in boxes]
        return _done(
            [
                WriteResult(index=item.index, size_in_bytes=size, storage_data=file)
                for item, size in zip(plan.items, sizes, strict=True)
            ]
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when every rank has written: index, metadata, manifest, and the change of names."""
        with _in_words():
            place = {result.index: result.storage_data for of_rank in results for result in of_rank}
            files = {file.name: file.record for file in place.values()}
            numbers = {name: number for number, name in enumerate(sorted(files))}
            tensors = {}
            for name in metadata.state_dict_metadata:
                tensor = stored_tensor(metadata, name)
                tensors[name] = {
                    "dtype": dtype_name(tensor.properties.dtype),
                    "shape": list(tensor.size),
                    "boxes": [
                        [list(c.offsets), list(c.sizes), numbers[place[MetadataIndex(name, c.offsets)].name]]
                        for c in tensor.chunks
                    ],
                }
            temporary = temporary_path(self._folder, self._step)
            index = json.dumps({"files": sorted(files), "tensors": tensors})
            files[INDEX] = write_file(temporary / INDEX, index.encode())
            files[META] = write_file(temporary / META, json.dumps(self._meta, indent=1).encode())
            commit(self._folder, self._step, files, self._status)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Never asked: writers are made here, not found by name."""
        return False


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, torch.Tensor | Deferred]], about: dict[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file, one tensor after the other, so that no second copy of them all is ever in memory.

    ``about`` is the header's free text, in which other programs look for the format of the tensors.

    Layout (https://github.com/huggingface/safetensors): the header's length as 8 bytes, little-endian; the header, JSON
    padded with blanks to a multiple of 8; the data without gaps.

    Raises:
        CheckpointError: data that was deferred has another shape or data type than was announced.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": about}
    end = 0
    for key, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            digest.update(data)
            size += file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for key, tensor in tensors:
            rows = tensor.rows if isinstance(tensor, Deferred) else None
            written = 0
            for part in [data_of(tensor)] if rows is None else rows():
                if part.dtype != tensor.dtype or (rows is None and part.shape != tensor.shape):
                    raise CheckpointError(_not_as_announced(key, tensor, _kind(part.shape, part.dtype)))
                written += part.numel()
                put(part.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
                del part  # before the next one is made
            if written != math.prod(tensor.shape):  # else the header is wrong about what follows
                raise CheckpointError(_not_as_announced(key, tensor, f"{written} numbers"))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _not_as_announced(key: str, tensor: torch.Tensor | Deferred, found: str) -> str:
    return f"{key} is {found}, but was announced as {_kind(tensor.shape, tensor.dtype)}; nothing can read such a file"


def _kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"


def box_key(index: MetadataIndex) -> str:
    """The name of a box in its file."""
    return f"{index.fqn}@{','.join(str(offset) for offset in index.offset or ())}"


# ------------------------------------------------------------------------------------------------- loading


def read_index(checkpoint: Path) -> Metadata:
    """What tensors a checkpoint holds and where their boxes are.

    Raises:
        CheckpointError: the index is not what this module writes.
    """
    path = checkpoint / INDEX
    try:
        content = json.loads(path.read_bytes())
        tensors, places = {}, {}
        for name, tensor in content["tensors"].items():
            chunks = []
            for offsets, sizes, number in tensor["boxes"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, offsets)] = content["files"][number]
            dtype = dtype_of(tensor["dtype"])
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["shape"]), chunks)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {type(error).__name__}: {error}") from None
    return Metadata(tensors, storage_data=places)


def stored_tensor(index: Metadata, name: str) -> TensorStorageMetadata:
    """What ``index`` says of a tensor.

    Raises:
        CheckpointError: it is no tensor; checkpoints hold nothing else.
    """
    stored = index.state_dict_metadata[name]
    if not isinstance(stored, TensorStorageMetadata):
        raise CheckpointError(f"{name} is not a tensor")
    return stored


class BoxLoadPlanner(LoadPlanner):
    """Plans the reading of the parts of a checkpoint that lie in this rank's boxes."""

    def __init__(self, entries: dict[str, ShardedTensor]) -> None:
        self._entries = entries
        self._boxes: dict[MetadataIndex, torch.Tensor] = {}
        self._metadata = Metadata({})

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the checkpoint's index; the state dict is empty, the entries were given before."""
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """A read item for every overlap of a wanted box with a stored one."""
        items: list[ReadItem] = []
        with _in_words():
            for name, entry in self._entries.items():
                chunks = []
                for offsets, tensor in entry.boxes:
                    if isinstance(tensor, Deferred):
                        raise CheckpointError(f"{name}: data that is deferred cannot be loaded into; give a tensor")
                    self._boxes[MetadataIndex(name, offsets)] = tensor
                    chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
                found = create_read_items_for_chunk_list(name, stored_tensor(self._metadata, name), chunks)
                wanted = sum(math.prod(chunk.sizes) for chunk in chunks)
                covered = sum(math.prod(item.lengths) for item in found)
                if covered != wanted:
                    raise CheckpointError(f"{name}: the index covers {covered} of {wanted} wanted elements")
                items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never called: checkpoints hold tensors only."""
        raise CheckpointError(f"{read_item.storage_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the destination that ``read_item`` fills, a view."""
        tensor = self._boxes[read_item.dest_index].detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the destination was written in place."""


class Reader(StorageReader):
    """Reads slices of safetensors files."""

    def __init__(self, checkpoint: Path, index: Metadata) -> None:
        self._checkpoint, self._index = checkpoint, index

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to do: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, which was read before."""
        return self._index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the destinations, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._index.storage_data[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with _in_words(), safe_open(self._checkpoint / name, framework="pt", device="cpu") as file:
                for item in items:
                    destination, found = planner.resolve_tensor(item), _read(file, item)
                    if found.shape != destination.shape:  # copy_ would broadcast it
                        raise CheckpointError(
                            f"{name} holds {list(found.shape)} of {box_key(item.storage_index)}, expected "
                            f"{list(destination.shape)}"
                        )
                    destination.copy_(found)
                    planner.commit_tensor(item, destination)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Never asked: readers are made here, not found by name."""
        return False


def _read(file: Any, item: ReadItem) -> torch.Tensor:
    key = box_key(item.storage_index)
    if not item.lengths:
        return file.get_tensor(key)
    region = tuple(
        slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
    )
    return file.get_slice(key)[region]
