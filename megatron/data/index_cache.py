"""Arrays that one process computes once, keeps in files, and others map into memory.

Files are written aside and renamed, so a process that is killed leaves no half-written array. Checksums find damaged
ones, which are computed anew.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron.data.errors import DataError
from megatron.data.files import crc32

logger = logging.getLogger(__name__)


def fill(folder: Path, base: str, names: Sequence[str], build: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """See to it that ``folder`` holds the arrays ``names`` of ``base``, whole; computes them where it does not.

    Raises:
        DataError: they cannot be written.
    """
    if is_whole([array_path(folder, base, name) for name in names], _checksums(folder, base)):
        return
    start = time.monotonic()

    def write(aside: Path) -> list[Path]:
        for name, array in build().items():
            np.save(array_path(aside, base, name), array)
        return [array_path(aside, base, name) for name in names]

    publish(folder, base, write)
    logger.info("built the sample index %s in %.1f s", folder / base, time.monotonic() - start)


def array_path(folder: Path, base: str, name: str) -> Path:
    """Where the array ``name`` of ``base`` lies."""
    return folder / f"{base}-{name}.npy"


def publish(folder: Path, base: str, write: Callable[[Path], Sequence[Path]]) -> None:
    """Let ``write`` put files into a folder aside, and move those that it returns to ``folder`` when all are complete.

    Raises:
        DataError: they cannot be written.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{base}.", dir=folder))  # no other run's, on whatever node
        try:
            made = list(write(aside))
            checksums = _checksums(aside, base)
            checksums.write_text(json.dumps({path.name: crc32(path) for path in made}))
            for path in (*made, checksums):  # the checksums come last: where they are, the rest is
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises DataError where the cache in ``folder`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the sample index to {folder}: {error}. Make room or choose another --data-cache-path"
        ) from error


def is_whole(paths: Sequence[Path], checksums: Path) -> bool:
    """Whether all files are there with the content that was written."""
    try:
        expected = json.loads(checksums.read_text())
        return all(path.is_file() and crc32(path) == expected.get(path.name) for path in paths)
    except (OSError, ValueError, AttributeError):
        return False


def _checksums(folder: Path, base: str) -> Path:
    return folder / f"{base}-checksums.json"
