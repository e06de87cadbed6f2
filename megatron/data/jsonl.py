"""Reading JSON-lines corpora: plain, .gz or .zst, in batches of lines, without ever holding a whole file."""

import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import zstandard

from megatron.data.errors import DataError

BATCH_BYTES = 1 << 18
_CHUNK = 1 << 20
_COMPRESSED_CHUNK = 1 << 17
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class LineBatch:
    """Some consecutive lines of one file."""

    path: str
    first: int
    """Number of the first line, from 1."""
    lines: list[bytes]
    consumed: int
    """Bytes read so far of all files, as they lie on disk; for progress."""


def check_inputs(paths: Sequence[str]) -> int:
    """Size of all files together in bytes.

    Raises:
        DataError: names every path that is no readable file, or that stands there twice.
    """
    problems = []
    for path in paths:
        if os.path.isdir(path):
            problems.append(f"{path} is a folder; give the files in it")
        elif not os.path.isfile(path):
            problems.append(f"{path}: there is no such file")
        elif not os.access(path, os.R_OK):
            problems.append(f"{path}: no permission to read it")
    problems += [f"{path} is given more than once" for path in sorted({p for p in paths if paths.count(p) > 1})]
    if not paths:
        problems.append("no file is given")
    if problems:
        raise DataError("--input: " + "; ".join(problems))
    return sum(os.path.getsize(path) for path in paths)


def read_batches(paths: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[LineBatch]:
    """The lines of all files in order, line ends included, in batches of about ``batch_bytes``.

    Raises:
        DataError: a compressed file is damaged or ends too early.
    """
    before = 0
    for path in paths:
        number = 1
        with open(path, "rb") as raw:
            lines: list[bytes] = []
            size = 0
            try:
                for line in _decompressed(path, raw):
                    lines.append(line)
                    size += len(line)
                    if size >= batch_bytes:
                        yield LineBatch(path, number, lines, before + raw.tell())
                        number += len(lines)
                        lines, size = [], 0
            except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
                raise DataError(
                    f"{path}: the compressed data is damaged or cut off after line {number + len(lines) - 1}: {error}. "
                    "Copy or compress the file anew"
                ) from error
            before += raw.tell()
        if lines:
            yield LineBatch(path, number, lines, before)


def document_texts(line: bytes, keys: Sequence[str], first_line: bool = False) -> list[str] | None:
    """The texts under ``keys`` of one JSON line; None where the line is blank.

    Args:
        line: the line, with or without its line end.
        keys: which fields to take.
        first_line: whether a byte-order mark may stand before it.

    Raises:
        DataError: the line is no UTF-8, no JSON object, or a field is missing or no text. The message is a reason
            without file and line number.
    """
    if first_line:
        line = line.removeprefix(_BOM)
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise DataError("not usable JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise DataError(f'a JSON {_NAMES[type(record)]}, expected an object such as {{"{keys[0]}": "..."}}')
    texts = []
    for key in keys:
        if key not in record:
            has = ", ".join(map(repr, list(record)[:5])) or "none"
            raise DataError(f"no key {key!r}; its keys: {has}")
        text = record[key]
        if not isinstance(text, str):
            raise DataError(f"{key!r} is a JSON {_NAMES[type(text)]}, expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{key!r} has half a surrogate pair at character {error.start}: no valid text") from None
        texts.append(text)
    return texts


_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
_NAMES[type(None)] = "null"


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
