"""Checksums of files, read in pieces."""

import hashlib
import os
import threading
import zlib
from pathlib import Path

_PIECE = 1 << 22


def sha256(path: str | Path, start: int = 0, end: int | None = None, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of the bytes ``[start, end)`` of a file; early, and wrong, once ``stop`` is set."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        left = (os.path.getsize(path) if end is None else end) - start
        while left > 0 and not (stop and stop.is_set()) and (data := file.read(min(left, _PIECE))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def crc32(path: str | Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with open(path, "rb") as file:
        while data := file.read(_PIECE):
            found = zlib.crc32(data, found)
    return found
