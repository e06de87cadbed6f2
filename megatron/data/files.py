"""Checksums of files, and writing them whole or not at all."""

import errno
import hashlib
import os
import threading
import zlib
from pathlib import Path
from typing import IO

from megatron.data.errors import DataError

try:
    import fcntl
except ImportError:  # no such locks on this platform
    fcntl = None  # type: ignore[assignment]

INDEX_CACHE = "index-cache"
"""Name of the folder in which training keeps its sample index unless told otherwise."""
ESCAPED = "backslashreplace"
"""How JSON is written where a path may be no UTF-8: Python holds such a byte as a lone surrogate, and JSON escapes that
in the same way."""
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


def write_whole(contents: dict[Path, bytes]) -> None:
    """Write files so that each appears complete or not at all, the folders they are in included."""
    unfinished = {path: path.with_name(path.name + ".incomplete") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(unfinished[path], path)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


def check_prefix(prefix: str, flag: str = "--output-prefix") -> None:
    """Raise DataError where no file's name can begin with ``prefix``, which ``flag`` gave."""
    if not prefix or prefix.endswith(os.sep):
        raise DataError(f"{flag} {prefix!r}: expected a folder and the beginning of a name, such as data/corpus")
    for folder in Path(prefix).parents:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{flag} {prefix}: {folder} is a file, expected a folder")


def check_writable(prefix: str) -> None:
    """Raise DataError where there is no permission to write files whose names begin with ``prefix``."""
    folder = next(folder for folder in Path(prefix).absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise DataError(f"{prefix}: no permission to write to {folder}")


def try_lock(file: IO | int) -> bool | None:
    """Take the lock on an open file, for as long as it is open.

    Returns:
        Whether it is this process's, and no other's; None where the platform or the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def take_lock(file: IO, prefix: str) -> None:
    """Keep other processes from writing what this one writes as ``prefix``, until ``file`` is closed.

    Raises:
        DataError: another process has the lock, or had it and has just renamed or removed ``file``.
    """
    free = try_lock(file)
    if free is None:
        return
    try:
        free = free and os.path.exists(file.name) and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError:
        return
    if not free:
        raise DataError(f"{prefix}: another process is writing it; wait for that one or give another --output-prefix")
