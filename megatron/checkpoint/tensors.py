"""What a checkpoint holds: named global tensors, of which each rank has some boxes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from megatron.checkpoint.errors import CheckpointError

# torch's data types and their names in a safetensors header
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Deferred:
    """Data that is made only when it is written, so that not all of it need be in memory at once.

    ``make`` returns a tensor of this shape and data type. It is called in the thread that saves, or before
    :meth:`megatron.checkpoint.AsyncSaver.save` returns. ``rows``, where it is there, makes the same data one row of the
    first dimension after the other.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    rows: Callable[[], Iterable[torch.Tensor]] | None = None

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


class Box(NamedTuple):
    """An n-dimensional rectangle of a global tensor: where it starts, and its data (of the box's own shape)."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor | Deferred


def data_of(tensor: torch.Tensor | Deferred) -> torch.Tensor:
    """The data of a box, detached; made now if it was deferred."""
    return tensor.make() if isinstance(tensor, Deferred) else tensor.detach()


@dataclasses.dataclass
class ShardedTensor:
    """This rank's part of one global tensor.

    For saving, the boxes hold the data, and those of all ranks together must cover every element once; ranks that keep
    the same data name the same boxes, which are then written once. For loading, the boxes are the destinations; any
    boxes will do, whoever saved the tensor. ``dtype`` is the type it is stored in. A box's tensor may be a view and may
    live on a GPU; for saving it may be :class:`Deferred`.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[Box]


def flat_boxes(shape: Sequence[int], start: int, numel: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the elements [start, start + numel) of a C-contiguous tensor of ``shape``, flattened, into boxes.

    Returns:
        At most ``max(1, 2 * len(shape) - 1)`` triples (offsets, sizes, position), in the order of memory: the box's
        place in the tensor, its shape, and where its elements begin within the range. A box is contiguous in memory.

    Raises:
        ValueError: the range does not lie within the tensor.
    """
    total = math.prod(shape)
    if start < 0 or numel < 0 or start + numel > total:
        raise ValueError(f"range [{start}, {start + numel}) is not within the {total} elements of shape {tuple(shape)}")
    if numel == 0:
        return []
    if not shape:
        return [((), (), 0)]
    inner_shape = tuple(shape[1:])
    inner = math.prod(inner_shape)
    boxes: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    at, end = start, start + numel
    while at < end:
        row, column = divmod(at, inner)
        if column == 0 and end - at >= inner:  # whole rows
            rows = (end - at) // inner
            boxes.append(((row, *(0 for _ in inner_shape)), (rows, *inner_shape), at - start))
            at += rows * inner
        else:  # a part of one row: the first or the last
            count = min(inner - column, end - at)
            for offsets, sizes, position in flat_boxes(inner_shape, column, count):
                boxes.append(((row, *offsets), (1, *sizes), at - start + position))
            at += count
    return boxes


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The type with that name, if it is one that checkpoints can hold.

    Raises:
        CheckpointError: it is not.
    """
    for dtype in DTYPES:
        if dtype_name(dtype) == name:
            return dtype
    raise CheckpointError(f"data type {name!r} is not one a checkpoint can hold: {[dtype_name(t) for t in DTYPES]}")


def by_name(entries: Iterable[ShardedTensor], *, exact_dtype: bool) -> dict[str, ShardedTensor]:
    """This rank's entries by name: entries of one name joined, boxes without elements left out, everything checked.

    Raises:
        CheckpointError: a box does not fit its tensor, has another data type (only with ``exact_dtype``) or starts
            where another one does, or two entries of one name contradict each other.
    """
    joined: dict[str, ShardedTensor] = {}
    for entry in entries:
        shape = tuple(entry.global_shape)
        if math.prod(shape) == 0:
            raise CheckpointError(
                f"{entry.name}: a tensor without elements, {list(shape)}, cannot be stored; leave it out"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.name}: {entry.dtype} cannot be stored; one of {[dtype_name(t) for t in DTYPES]} can"
            )
        known = joined.setdefault(entry.name, ShardedTensor(entry.name, shape, entry.dtype, []))
        if (known.global_shape, known.dtype) != (shape, entry.dtype):
            raise CheckpointError(
                f"{entry.name} is named twice, as {known.global_shape} {known.dtype} and as {shape} {entry.dtype}"
            )
        places = {box.offsets for box in known.boxes}
        for offsets, tensor in entry.boxes:
            box = Box(tuple(int(offset) for offset in offsets), tensor)
            _check_box(entry, box, exact_dtype)
            if tensor.numel() == 0:
                continue
            if box.offsets in places:
                raise CheckpointError(
                    f"{entry.name}: two boxes of this rank start at {list(box.offsets)}; name each once"
                )
            places.add(box.offsets)
            known.boxes.append(box)
    return joined


def _check_box(entry: ShardedTensor, box: Box, exact_dtype: bool) -> None:
    shape, sizes = tuple(entry.global_shape), tuple(box.tensor.shape)
    fits = len(box.offsets) == len(sizes) == len(shape) and all(
        offset >= 0 and offset + size <= extent for offset, size, extent in zip(box.offsets, sizes, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{entry.name}: the box at {list(box.offsets)} of shape {list(sizes)} does not lie within the global shape "
            f"{list(shape)}"
        )
    if exact_dtype and box.tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"{entry.name}: the box at {list(box.offsets)} is {box.tensor.dtype}, but the entry says {entry.dtype}"
        )
