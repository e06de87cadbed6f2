"""A folder that appears complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.folder import MANIFEST, sync_folder

_MARGIN = 64 << 20  # bytes beside the tensors: configuration, tokenizer, file headers


def check_free(folder: str | os.PathLike) -> Path:
    """The absolute name of ``folder``, links followed, if a new folder can take it.

    Raises:
        CheckpointError: something is there already, a file system is mounted there, or it is inside a checkpoint.
    """
    try:
        final = Path(folder).resolve()
    except RuntimeError as error:  # Python before 3.13
        raise CheckpointError(f"--save {folder} is a link to itself: {error}; give another folder") from None
    inside = next((parent for parent in final.parents if (parent / MANIFEST).is_file()), None)
    if inside is not None:
        raise CheckpointError(
            f"--save {folder} is inside the checkpoint {inside}, and would be deleted with it; give a folder outside"
        )
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"--save {folder} is there already and not empty; give another folder, or remove it")
    if final.is_mount():
        raise CheckpointError(
            f"--save {folder} is where a file system is mounted, which no new folder can replace; give one in it: "
            f"{final / 'converted'}, for example"
        )
    return final


@contextlib.contextmanager
def staged(folder: str | os.PathLike, size: int) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its name when the block ends without an error, else is deleted.

    Args:
        folder: must not exist, or be empty.
        size: bytes that will be written.

    Raises:
        CheckpointError: the name is taken, the disk has not enough room, or writing failed.
    """
    final = check_free(folder)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    made = _missing_parents(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < size + _MARGIN:
            raise CheckpointError(
                f"--save {folder}: {_size(size + _MARGIN)} are needed, {_size(free)} are free on that disk; nothing "
                "was written. Make room, use another disk, or write less: --dtype bf16, --drop-optimizer"
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


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:.0f} MB"
