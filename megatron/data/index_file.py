"""PREFIX.idx, byte by byte.

A head, then the length of each sequence (int32, tokens), the offset of each in the .bin (int64, bytes), and for each
document, after a zero, how many sequences end with it (int64). A document has as many sequences as whoever wrote it
gave it; ours have one, and none where the document is empty.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from megatron.data.errors import DataError

HEAD = struct.Struct("<9sQBQQ")  # magic, version, type of a token, sequences, documents + 1
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20
"""Numbers that are held in memory at a time."""
ANEW = "Copy it anew, or preprocess anew"


@dataclasses.dataclass(frozen=True)
class Index:
    """An .idx, its arrays mapped into memory."""

    dtype: np.dtype
    lengths: np.ndarray
    """int32 [sequences], tokens."""
    offsets: np.ndarray
    """int64 [sequences], bytes from the beginning of the .bin."""
    ends: np.ndarray
    """int64 [documents + 1], sequences before each document, and all of them."""

    @property
    def documents(self) -> int:
        return len(self.ends) - 1

    @property
    def tokens(self) -> int:
        return self.sum_lengths(0, len(self.lengths))

    def sum_lengths(self, first: int, last: int) -> int:
        """Tokens of the sequences ``first`` to ``last`` - 1."""
        return sum(int(part.sum(dtype=np.int64)) for part in chunks(self.lengths[first:last]))

    def document_lengths(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first], tokens of these documents."""
        ends = self.ends[first : last + 1]
        sums = np.concatenate([[0], np.cumsum(self.lengths[ends[0] : ends[-1]], dtype=np.int64)])
        return np.diff(sums[ends - ends[0]])


def read_index(prefix: str) -> Index:
    """The .idx of the dataset ``prefix``.

    Raises:
        DataError: it is missing or damaged, or its .bin is not as long as it says.
    """
    path = f"{prefix}.idx"
    for name in (path, f"{prefix}.bin"):
        if not os.path.isfile(name):
            raise DataError(f"{prefix}: there is no {name}; give the prefix of a dataset, without .bin or .idx")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(HEAD.size)
    magic, version, code, sequences, documents = HEAD.unpack(head) if len(head) == HEAD.size else (b"", 0, 0, 0, 0)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise DataError(f"{path} is no index of a dataset, or a damaged one: it begins with {head[:18]!r}. {ANEW}")
    expected = HEAD.size + 12 * sequences + 8 * documents
    if size != expected:
        raise DataError(
            f"{path} is no index of a dataset, or a damaged one: it has {size} bytes, expected {expected}. {ANEW}"
        )
    lengths_at, offsets_at = HEAD.size, HEAD.size + 4 * sequences
    index = Index(
        np.dtype(DTYPES[code]),
        _mapped(path, np.int32, sequences, lengths_at),
        _mapped(path, np.int64, sequences, offsets_at),
        _mapped(path, np.int64, documents, offsets_at + 8 * sequences),
    )
    expected = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize if sequences else 0
    size = os.path.getsize(f"{prefix}.bin")
    if size != expected:
        raise DataError(
            f"{prefix}: the .bin has {size} bytes, but its .idx speaks of {expected} bytes of tokens. The two do not "
            "belong together or were not copied whole"
        )
    return index


def map_tokens(prefix: str, index: Index) -> np.ndarray:
    """The tokens of the .bin of ``prefix``, mapped into memory."""
    return np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r") if index.tokens else np.empty(0, index.dtype)


def index_problems(index: Index) -> list[str]:
    """What in an index contradicts itself; reads all of it."""
    problems = []
    end = 0
    for first in range(0, len(index.lengths), CHUNK):
        lengths, offsets = index.lengths[first : first + CHUNK], index.offsets[first : first + CHUNK]
        ends = end + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        if lengths.min() < 0 or not np.array_equal(offsets, np.concatenate([[end], ends[:-1]])):
            problems.append(f"the .idx is damaged between sequences {first} and {first + len(lengths)}")
        end = int(ends[-1])
    rising = len(index.ends) > 0 and all((np.diff(part) >= 0).all() for part in _overlapping(index.ends))
    if not rising or int(index.ends[0]) != 0 or int(index.ends[-1]) != len(index.lengths):
        problems.append("the .idx is damaged: its documents do not end where its sequences do")
    return problems


def _overlapping(array: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, max(len(array) - 1, 1), CHUNK):
        yield array[first : first + CHUNK + 1]


def _mapped(path: str, dtype: type, count: int, offset: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def write_index(file: BinaryIO, dtype: np.dtype, lengths: np.ndarray, ends: np.ndarray) -> None:
    """Write an .idx, in pieces.

    Args:
        file: where to.
        dtype: of a token.
        lengths: int32 [sequences], tokens of each, one after another in the .bin.
        ends: int64 [documents], sequences up to the end of each.
    """
    file.write(HEAD.pack(MAGIC, 1, _CODES[np.dtype(dtype)], len(lengths), len(ends) + 1))
    for part in chunks(lengths):
        file.write(part.tobytes())
    before = 0
    for part in chunks(lengths):
        token_ends = before + np.cumsum(part, dtype=np.int64)
        file.write(((token_ends - part) * np.dtype(dtype).itemsize).tobytes())
        before = int(token_ends[-1])
    file.write(bytes(8))
    for part in chunks(ends):
        file.write(part.tobytes())


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """``array`` in pieces that fit into memory."""
    for first in range(0, len(array), CHUNK):
        yield array[first : first + CHUNK]
