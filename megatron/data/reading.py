"""Records of a corpus, in batches: lines of JSON or text, whole text files, rows of Parquet files.

Files of lines may be compressed (.gz, .zst). No file is ever held as a whole, but a text file that is one document.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import zstandard

from megatron.data.errors import DataError
from megatron.data.inputs import STANDARD_INPUT, Span, format_of

BATCH_BYTES = 1 << 18
TEXT_DOCUMENTS = ("file", "line")
_ROWS = 256
_CHUNK = 1 << 20
_COMPRESSED_CHUNK = 1 << 17
JSON, LINE, WHOLE, ROW = "json", "line", "whole", "row"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where reading goes on: after so many records of a span, and so many bytes of what they are when unpacked."""

    span: int = 0
    records: int = 0
    offset: int = 0


@dataclasses.dataclass
class Batch:
    """Some consecutive records of one span."""

    span: Span
    kind: str
    """What a record is: ``JSON`` or ``LINE`` (a line with its end), ``WHOLE`` (a file), ``ROW`` (values by key)."""
    first: int
    """Number of the first record, from 1 at the span's beginning."""
    records: list[Any]
    consumed: int
    """Bytes read so far of all spans, as they lie on disk; for progress."""
    end: Position
    """Where the next batch begins."""


def read_batches(
    spans: Sequence[Span],
    keys: Sequence[str] = ("text",),
    *,
    text_documents: str = "file",
    start: Position | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[Batch]:
    """The records of all spans in order, in batches of about ``batch_bytes``.

    Args:
        spans: what to read.
        keys: columns of Parquet files.
        text_documents: whether each ``file`` or each ``line`` of a .txt file is a document.
        start: where to go on.
        batch_bytes: unpacked bytes of a batch, a longer record excepted.

    Raises:
        DataError: a file is damaged or ends too early, or a Parquet file lacks a column.
    """
    start = start or Position()
    before = sum(span.end - span.start for span in spans[: start.span])
    for index, span in enumerate(spans[start.span :], start=start.span):
        begin = start if index == start.span else Position(index)
        kind = {".txt": LINE if text_documents == "line" else WHOLE, ".parquet": ROW}.get(format_of(span.path), JSON)
        read = {WHOLE: _read_whole, ROW: _read_rows}.get(kind, _read_lines)
        number = begin.records
        for records, offset, consumed in read(span, keys, begin.offset, batch_bytes):
            end = Position(index, number + len(records), offset)
            yield Batch(span, kind, number + 1, records, before + consumed, end)
            number += len(records)
        before += span.end - span.start


def lines_before(span: Span) -> int:
    """Number of lines of the file that end before the span's first one begins; of rows of a Parquet file."""
    count, left = 0, 0
    if format_of(span.path) == ".parquet":
        with _parquet(span) as file:
            begins = _group_begins(file, span.size)
            rows = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            return sum(count for count, begin in zip(rows, begins, strict=False) if begin < span.start)
    if span.start > 0:
        with open(span.path, "rb") as file:
            left = span.start - 1
            while left > 0 and (data := file.read(min(left, _CHUNK))):
                count += data.count(b"\n")
                left -= len(data)
            count += file.readline().endswith(b"\n")
    return count


# What the readers yield: records, unpacked bytes (or rows) of the span up to their end, bytes on disk up to there.
_Read = Iterator[tuple[list[Any], int, int]]


def _read_lines(span: Span, keys: Sequence[str], offset: int, batch_bytes: int) -> _Read:
    standard_input = span.path == STANDARD_INPUT
    with open(sys.stdin.fileno() if standard_input else span.path, "rb", closefd=not standard_input) as raw:
        if span.start > 0:
            raw.seek(span.start - 1)
            raw.readline()  # belongs to the span before; one byte of it, if that is where a line ends
        origin = 0 if standard_input else raw.tell()
        length = None if span.whole else span.end - origin
        lines: list[bytes] = []
        size, count = 0, 0
        try:
            file = _decompressed(span.path, raw)
            if offset:
                _skip(file, raw, offset)
            for line in file:
                if length is not None and offset + size >= length:
                    break
                lines.append(line)
                size += len(line)
                if size >= batch_bytes:
                    offset += size
                    count += len(lines)
                    yield lines, offset, offset if file is raw else raw.tell()
                    lines, size = [], 0
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DataError(
                f"{span.path}: the compressed data is damaged or cut off after line {count + len(lines)} of what was "
                f"read: {error}. Copy or compress the file anew"
            ) from error
    if lines:
        yield lines, offset + size, span.end - span.start


def _skip(file: BinaryIO, raw: BinaryIO, size: int) -> None:
    if file is raw:
        raw.seek(size, io.SEEK_CUR)
        return
    while size > 0 and (data := file.read(min(size, _CHUNK))):
        size -= len(data)
    if size:
        raise EOFError("it is shorter than it was")


def _read_whole(span: Span, keys: Sequence[str], offset: int, batch_bytes: int) -> _Read:
    if offset:
        return
    with open(span.path, "rb") as raw:
        try:
            data = _decompressed(span.path, raw).read()
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{span.path}: the compressed data is damaged or cut off: {error}") from error
    yield [data], max(len(data), 1), span.size


def _read_rows(span: Span, keys: Sequence[str], offset: int, batch_bytes: int) -> _Read:
    with _parquet(span) as file:
        names = file.schema_arrow.names
        if missing := [key for key in keys if key not in names]:
            raise DataError(f"{span.path} has no column {', '.join(missing)}; its columns: {', '.join(names)}")
        if twice := [key for key in keys if names.count(key) > 1]:
            raise DataError(f"{span.path} has more than one column {', '.join(twice)}")
        begins = _group_begins(file, span.size)
        groups = [group for group in range(file.num_row_groups) if span.start <= begins[group] < span.end]
        sizes = {group: file.metadata.row_group(group).num_rows for group in groups}
        rows, skip = sum(sizes.values()), offset
        while groups and skip >= sizes[groups[0]]:  # whole groups that are done need not be read again
            skip -= sizes[groups.pop(0)]
        done = offset
        tables = (  # a group at a time: asked for many, pyarrow keeps all of them
            table
            for group in groups
            for table in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=list(keys))
        )
        for table in tables:
            if skip >= len(table):
                skip -= len(table)
                continue
            columns = [_values(table.column(key).slice(skip)) for key in keys]
            skip = 0
            records = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
            done += len(records)
            yield records, done, (span.end - span.start) * done // max(rows, 1)


def _values(column: Any) -> list[Any]:
    """What a column holds; a text that is no UTF-8 as the bytes that it is, so that only its row is broken."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        values: list[Any] = column.cast(pyarrow.large_binary()).to_pylist()
        for place, value in enumerate(values):
            with contextlib.suppress(UnicodeDecodeError, AttributeError):  # AttributeError: of None
                values[place] = value.decode("utf-8")
        return values


@contextlib.contextmanager
def _parquet(span: Span) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f'{span.path}: reading Parquet needs pyarrow; pip install "megatron-moe[data]"') from error
    try:
        with parquet.ParquetFile(span.path, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{span.path} is no Parquet file, or a damaged one: {error}") from error


def _group_begins(file: Any, size: int) -> list[int]:
    """Where each group of rows begins, were groups all that a file of ``size`` bytes holds."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    sizes = [sum(group.column(column).total_compressed_size for column in range(group.num_columns)) for group in groups]
    return [before * size // max(sum(sizes), 1) for before in itertools.accumulate(sizes[:-1], initial=0)]


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _CHUNK)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), _CHUNK)
    return raw


class _ZstdReader(io.RawIOBase):
    """Bytes of one or more zstd frames. Unlike zstandard's own reader it notices when the last frame is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame = self._new_frame()
        self._started = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and self._advance():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _advance(self) -> bool:
        """Decompress one more piece. Returns False at the end of the file."""
        compressed = self._compressed or self._raw.read(_COMPRESSED_CHUNK)
        if not compressed:
            if self._started:
                raise EOFError("the file ends within a zstd frame")
            return False
        self._ready = memoryview(self._frame.decompress(compressed))
        self._started = not self._frame.eof
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = self._new_frame()
        return True
