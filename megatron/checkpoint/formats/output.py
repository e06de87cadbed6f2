"""A folder that appears complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.folder import sync_folder

_MARGIN = 64 << 20  # bytes beside the tensors: configuration, tokenizer, file headers


@contextlib.contextmanager
def staged(folder: str | os.PathLike, size: int) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its name when the block ends without an error, else is deleted.

    Args:
        folder: must not exist, or be empty.
        size: bytes that will be written.

    Raises:
        CheckpointError: the name is taken, the disk has not enough room, or writing failed.
    """
    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"--save {folder} is there already and not empty; give another folder, or remove it")
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    made = _missing_parents(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < size + _MARGIN:
            raise CheckpointError(
                f"--save {folder}: {_gigabytes(size + _MARGIN)} are needed, {_gigabytes(free)} are free on that disk; "
                "nothing was written. Make room, use another disk, or write less: --dtype bf16, --drop-optimizer"
            )
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if final.exists():
            final.rmdir()
        temporary.rename(final)
        sync_folder(final.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"--save {folder} cannot be written: {error}; nothing was left behind") from error
        raise


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.parents if not parent.exists()]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
