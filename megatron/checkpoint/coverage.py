"""Whether the files of a checkpoint hold what its index says, by their headers alone: no data is read."""

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron.checkpoint.storage import box_key, stored_tensor
from megatron.checkpoint.tensors import DTYPES

Kind = tuple[list[int], str]  # shape and data type of a box, as safetensors names it


def coverage_problems(checkpoint: Path, index: Metadata) -> list[str]:
    """What keeps the tensors of ``index`` from being read whole and in their own data type, in words."""
    problems: list[str] = []
    files: dict[str, dict[str, Kind]] = {}
    for name in sorted(set(index.storage_data.values())):
        try:
            files[name] = _boxes(checkpoint / name)
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} cannot be read: {error}")
    for name in index.state_dict_metadata:
        stored = stored_tensor(index, name)
        if not _tiled(stored):
            problems.append(f"the boxes of {name} do not cover its {math.prod(stored.size)} elements once each")
        for chunk in stored.chunks:
            box = MetadataIndex(name, chunk.offsets)
            file, key = index.storage_data[box], box_key(box)
            expected = (list(chunk.sizes), DTYPES[stored.properties.dtype])
            if file in files and files[file].get(key) != expected:
                problems.append(f"{key} is {files[file].get(key, 'missing')} in {file}, expected {expected}")
    return problems


def _boxes(file: Path) -> dict[str, Kind]:
    with safe_open(file, framework="pt", device="cpu") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
        return {key: (list(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def _tiled(stored: TensorStorageMetadata) -> bool:
    """Whether the boxes lie within the tensor, have no element in common, and are as many elements as it has."""
    rank = len(stored.size)
    for chunk in stored.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == rank or any(
            offset < 0 or offset + size > extent
            for offset, size, extent in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        ):
            return False
    if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
        return False
    near: list[ChunkStorageMetadata] = []  # boxes that reach into the row at which the next one begins
    for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
        near = [box for box in near if not rank or box.offsets[0] + box.sizes[0] > chunk.offsets[0]]
        if any(_overlap(box, chunk) for box in near):
            return False
        near.append(chunk)
    return True


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + n and b < a + m for a, m, b, n in spans)
