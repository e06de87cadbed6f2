"""Where results go: looked at before anything is computed, and written whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path


def check_output(folder: Path, size: int) -> None:
    """Look whether files can be made in ``folder``, or where it will be made. Leaves nothing behind.

    Args:
        folder: need not exist.
        size: bytes that are wanted there.

    Raises:
        ValueError: nothing can be written there, or the disk is too full.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"--output: nothing can be written to {folder} ({error}); give another place") from None
    free = shutil.disk_usage(there).free
    if free < size:
        raise ValueError(
            f"--output: {size / 1e6:.0f} MB may be needed in {folder}, {free / 1e6:.0f} MB are free on that disk; make "
            "room, or use another one"
        )


def write_whole(file: Path, text: str) -> None:
    """Write a file, which keeps its old content if that fails."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
