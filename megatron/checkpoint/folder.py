"""The folder of a run's checkpoints: what lies where, what counts as complete, and how a new one takes its place.

    SAVE/latest                    the name of the checkpoint to go on from
    SAVE/step_00000100/
        data-00000.safetensors     tensors, one file a rank that had something to write
        index.json                 every tensor: data type, global shape, its boxes and their files
        meta.json                  what else the run wants to remember
        manifest.json              size and SHA-256 of every other file; written last
        unconfirmed                its CheckpointStatus, unless that is CONFIRMED; not in the manifest
    SAVE/.step_00000200.tmp/       being written, or left over by a crash: never loaded
    SAVE/.step_00000100.replaced/  an older save of the same step, for the moment in which the newer one takes its name
    SAVE/.step_00000100.deleted/   being deleted

A checkpoint appears under its own name complete or not at all, because renaming a folder is atomic; a crash at any
moment leaves at least the previous one loadable.
"""

import contextlib
import dataclasses
import enum
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError

MANIFEST, META, INDEX, LATEST = "manifest.json", "meta.json", "index.json", "latest"
UNCONFIRMED = "unconfirmed"
FORMAT = 1

_NAME = re.compile(r"step_\d{8,}")
_REPLACED = re.compile(r"\.(step_\d{8,})\.replaced")
_LITTER = re.compile(r"\.step_\d{8,}\.(tmp|deleted)")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    size: int  # bytes
    sha256: str  # hexadecimal


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The last file of a checkpoint to be written; its presence says that the others are there."""

    step: int
    saved_at: float  # seconds since 1970
    files: dict[str, FileRecord]


class CheckpointStatus(enum.Enum):
    """What is known of the weights in a checkpoint. Without a record, as in those of earlier versions, CONFIRMED."""

    CONFIRMED = "confirmed"  # good: a good update followed it
    ENDED = "ended"  # counts as good: the run ended with it, after a good update
    PENDING = "pending"  # saved after a good update; the next one will tell
    DOUBTED = "doubted"  # no good update has followed, and one that was not good has

    @property
    def good(self) -> bool:
        """Whether it counts for ``--keep-last``."""
        return self in (CheckpointStatus.CONFIRMED, CheckpointStatus.ENDED)


def step_name(step: int) -> str:
    """The name of the folder of one checkpoint."""
    return f"step_{step:08d}"


# ------------------------------------------------------------------------------------------------- reading


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {content['format']}; this version reads format {FORMAT}")
        if content.pop("sha256") != _digest(content):
            raise CheckpointError(f"{path} is damaged: its contents do not match its own checksum")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return Manifest(content["step"], content["saved_at"], files)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {checkpoint} is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder has a readable manifest. Does not look at the data."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, the most recently saved first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        replaced = _REPLACED.fullmatch(path.name)
        if not (_NAME.fullmatch(path.name) or replaced) or (replaced and is_complete(folder / replaced[1])):
            continue
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            found.append((manifest.saved_at, manifest.step, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def checkpoint_status(checkpoint: Path) -> CheckpointStatus:
    """The status of a checkpoint. A record that cannot be read is no confirmation."""
    try:
        return CheckpointStatus((checkpoint / UNCONFIRMED).read_text().strip())
    except FileNotFoundError:
        return CheckpointStatus.CONFIRMED
    except (OSError, ValueError):
        return CheckpointStatus.PENDING


def _best_first(checkpoints: list[Path]) -> list[Path]:
    """Those in doubt last, else in the order given."""
    return sorted(checkpoints, key=lambda path: checkpoint_status(path) is CheckpointStatus.DOUBTED)


def latest(folder: str | os.PathLike) -> Path | None:
    """The checkpoint to go on from: the one marked latest, or the most recently saved complete one with a warning (of
    those in doubt only if there are no others).

    Args:
        folder: a run's folder, or one checkpoint's own folder (which is then the answer).

    Returns:
        The checkpoint's folder; None if ``folder`` does not exist or no checkpoint was ever completed in it.

    Raises:
        CheckpointError: there are checkpoints, but not one is complete; or ``folder`` bears a checkpoint's name and is
            not one.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder
    if _NAME.fullmatch(folder.name) or (folder / INDEX).exists():
        try:
            read_manifest(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {load_instead(folder)}") from None
    marked = _marked(folder)
    if marked is not None and is_complete(folder / marked):
        return folder / marked
    complete = _best_first(complete_checkpoints(folder))
    if complete:
        said = (
            "is missing"
            if marked is None
            else f"names {marked}, which cannot be used: {_why_incomplete(folder / marked)}"
        )
        warnings.warn(f"{folder / LATEST} {said}; using {complete[0]}, the newest complete checkpoint", stacklevel=2)
        return complete[0]
    remains = sorted(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []
    if marked is not None or remains:
        raise CheckpointError(
            f"no complete checkpoint in {folder}: {LATEST} says {marked or 'nothing'}, and of the folders "
            f"{remains} none has an intact {MANIFEST}. Restore one of them, or give another folder"
        )
    return None


def _why_incomplete(checkpoint: Path) -> str:
    try:
        read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    return "it was completed meanwhile"


def _marked(folder: Path) -> str | None:
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _NAME.fullmatch(name) else repr(name)


def damage(checkpoint: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint, in words; None if it is as it was written."""
    try:
        size = (checkpoint / name).stat().st_size
        if size != record.size:
            return f"{name} has {size} bytes instead of {record.size}"
        if hash_file(checkpoint / name) != record.sha256:
            return f"{name} has another SHA-256 than when it was written (its contents changed)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None


def load_instead(checkpoint: Path) -> str:
    """What to load instead of a damaged checkpoint."""
    others = [path for path in _best_first(complete_checkpoints(checkpoint.parent)) if path.name != checkpoint.name]
    if others:
        return f"Load {others[0]} instead" + (f" (older ones: {[p.name for p in others[1:4]]})" if others[1:] else "")
    return f"There is no other complete checkpoint in {checkpoint.parent}; restore the files from a copy"


@contextlib.contextmanager
def in_use(checkpoint: Path) -> Iterator[None]:
    """While this is open, no save (of this or another process) deletes the checkpoint as too old."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks; or nothing there, which others will tell
            file = stack.enter_context(open(checkpoint / MANIFEST, "rb"))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _kept_from_use(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody is in :func:`in_use`; if so, who comes waits until this is closed, and sees what is there."""
    with contextlib.ExitStack() as stack:
        free = True
        try:
            file = stack.enter_context(open(checkpoint / MANIFEST, "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks, or no manifest
        yield free


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- writing


def temporary_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written until it is complete."""
    return folder / f".{step_name(step)}.tmp"


def begin(folder: Path, step: int) -> Path:
    """Make the folder to write a checkpoint into, after removing what crashed saves left over."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if replaced := _REPLACED.fullmatch(path.name):
            name = folder / replaced[1]
            if is_complete(name):
                _delete(path)
            else:  # the crash came before the newer save of the same step took the name
                if name.exists():
                    _delete(name)
                path.rename(name)
        elif _LITTER.fullmatch(path.name):
            shutil.rmtree(path)
    temporary = temporary_path(folder, step)
    temporary.mkdir()
    return temporary


def abandon(folder: Path, step: int) -> None:
    """Give back the disk space of a save that failed."""
    shutil.rmtree(temporary_path(folder, step), ignore_errors=True)


def commit(
    folder: Path, step: int, files: Mapping[str, FileRecord], status: CheckpointStatus = CheckpointStatus.CONFIRMED
) -> Path:
    """Turn the folder made by :func:`begin` into the checkpoint of ``step`` and mark it latest.

    Args:
        files: every file in it; all are on disk already.
        status: of the checkpoint. One in doubt is marked latest only if no other checkpoint is.
    """
    temporary, final = temporary_path(folder, step), folder / step_name(step)
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "saved_at": time.time(),
        "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
    }
    content["sha256"] = _digest(content)
    if status is not CheckpointStatus.CONFIRMED:
        write_file(temporary / UNCONFIRMED, f"{status.value}\n".encode())
    write_file(temporary / MANIFEST, json.dumps(content, indent=1).encode())
    sync_folder(temporary)
    replaced = folder / f".{final.name}.replaced"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(folder)
    marked = _marked(folder)
    if status is not CheckpointStatus.DOUBTED or marked is None or not is_complete(folder / marked):
        mark_latest(final)
    if replaced.exists():
        _delete_or_warn(replaced)
    return final


def mark_latest(checkpoint: Path) -> None:
    """Have ``latest`` name a checkpoint."""
    folder = checkpoint.parent
    if _marked(folder) == checkpoint.name:
        return
    mark = folder / f".{LATEST}.tmp"
    write_file(mark, f"{checkpoint.name}\n".encode())
    mark.replace(folder / LATEST)
    sync_folder(folder)


def record_status(checkpoint: Path, status: CheckpointStatus) -> None:
    """Record the status of a checkpoint; a crash leaves the record from before or the new one."""
    if status is CheckpointStatus.CONFIRMED:
        (checkpoint / UNCONFIRMED).unlink(missing_ok=True)
    else:
        unfinished = checkpoint / f".{UNCONFIRMED}.tmp"
        write_file(unfinished, f"{status.value}\n".encode())
        unfinished.replace(checkpoint / UNCONFIRMED)
    sync_folder(checkpoint)


def delete_older(folder: Path, keep_last: int, spared: Path | None = None) -> None:
    """Delete all but the ``keep_last`` most recently saved good checkpoints (0: keep all), and those that are not good
    and were saved before the newest good one. What cannot be deleted is a warning.

    Never deleted are ``spared``, the newest confirmed one, and one that is marked latest or being loaded.
    """
    if keep_last <= 0:
        return
    try:
        newest_first = {path: checkpoint_status(path) for path in complete_checkpoints(folder)}
    except OSError as error:
        warnings.warn(f"cannot look for old checkpoints in {folder}: {error}", stacklevel=2)
        return
    good = [path for path, status in newest_first.items() if status.good]
    confirmed = [path for path in good if newest_first[path] is CheckpointStatus.CONFIRMED]
    kept = {path.name for path in good[:keep_last] + confirmed[:1]} | {_marked(folder), spared and spared.name}
    for path in itertools.dropwhile(lambda path: path not in good, newest_first):
        if path.name not in kept:
            _delete_or_warn(path, in_use_too=False)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a file so that it survives a power failure."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power failure."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def _delete(path: Path, *, in_use_too: bool = True) -> None:
    """Delete a checkpoint; renamed first, so that half of one never bears a checkpoint's name."""
    doomed = path.with_name(f".{path.name.removeprefix('.').removesuffix('.replaced')}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    with contextlib.nullcontext(True) if in_use_too else _kept_from_use(path) as free:
        if not free:
            return
        path.rename(doomed)
    shutil.rmtree(doomed)


def _delete_or_warn(path: Path, *, in_use_too: bool = True) -> None:
    try:
        _delete(path, in_use_too=in_use_too)
    except OSError as error:  # the new checkpoint is safe all the same
        warnings.warn(f"cannot delete the old checkpoint {path}: {error}", stacklevel=2)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
