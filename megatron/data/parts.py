"""What cleaning writes: PREFIX-00000.jsonl.zst and so on, what was removed, and the report."""

import contextlib
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron.data.errors import DataError
from megatron.data.files import ESCAPED
from megatron.data.journal import Journal

_UNFINISHED = ".incomplete."


class Parts:
    """The output files, under unfinished names until :meth:`publish`.

    A run that is stopped leaves behind, with its journal, the files that were full; the same run started again goes on
    after them. Without a journal nothing is left, but by a kill.

    Args:
        prefix: path and beginning of the names.
        part_bytes: of text, after which a file is full.
        overwrite: whether existing output may be replaced.
        journal: of the run.

    Raises:
        DataError: there is output, or what a stopped run left is not what it wrote.
    """

    def __init__(self, prefix: str, part_bytes: int, overwrite: bool, journal: Journal) -> None:
        self._prefix, self._part_bytes, self._journal = prefix, part_bytes, journal
        old = _existing(prefix)
        if old and not overwrite:
            raise DataError(f"{', '.join(map(str, old))} exist already; give --overwrite or another --output-prefix")
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._removed = open(  # noqa: SIM115 - closed by publish and __exit__
            f"{prefix}{_UNFINISHED}removed.jsonl", "a", encoding="utf-8", errors=ESCAPED
        )
        self._sizes: list[int] = []
        """Bytes of the files that are full."""
        self._file: BinaryIO | None = None
        self._size = 0
        self.leftovers = False
        """An earlier run was stopped, and nothing of what it did can be kept."""
        self._go_on()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        with contextlib.suppress(OSError):  # flushing to a full disk
            self.close_part()
        with contextlib.suppress(OSError):
            self._removed.close()
        if self._journal.last:
            print(f"what was done is kept ({self._journal.path}): the same command goes on", file=sys.stderr)
        else:
            for path in _unfinished(self._prefix):
                path.unlink(missing_ok=True)

    @property
    def full(self) -> bool:
        """Whether the file that is being written should be closed."""
        return self._size >= self._part_bytes

    def add(self, line: bytes) -> None:
        """Write a document that stays."""
        if self._file is None:
            self._file = self._open_part()
        self._file.write(line)
        self._size += len(line)

    def remove(self, path: str, number: int, reason: str, first: str | None) -> None:
        """Note a document that has to go."""
        record = {"file": path, "line": number, "reason": reason} | ({"like": first} if first else {})
        self._removed.write(json.dumps(record, ensure_ascii=False) + "\n")

    def close_part(self) -> None:
        """The next document begins another file."""
        if self._file is None:
            return
        file, self._file, self._size = self._file, None, 0
        file.close()
        path = self._part(len(self._sizes))
        _sync(path)
        self._sizes.append(path.stat().st_size)

    def save(self, point: dict[str, Any]) -> None:
        """Note in the journal how far the run is. Call it when no file is half full."""
        self._removed.flush()
        os.fsync(self._removed.fileno())
        self._journal.save(point | {"parts": self._sizes, "removed": os.path.getsize(self._removed.name)})

    def publish(self, counts: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        """Write the report and give all files their names; returns those with documents."""
        self.close_part()
        report = Path(f"{self._prefix}{_UNFINISHED}cleaning.json")
        report.write_text(json.dumps(counts | {"bytes": self._sizes} | settings, indent=2) + "\n", encoding="utf-8")
        _sync(report)
        old = [str(path) for path in _existing(self._prefix)]
        self.save({"counts": counts, "complete": {"parts": len(self._sizes), "old": old}})
        files = publish(self._prefix, self._journal.last["complete"])  # type: ignore[index] - just saved
        self._removed.close()
        self._journal.remove()
        return files

    def _go_on(self) -> None:
        point = self._journal.last or {"parts": [], "removed": 0}
        self._sizes = list(point["parts"])
        kept = [self._part(number) for number in range(len(self._sizes))]
        found = [path.stat().st_size if path.exists() else None for path in kept]
        if found != self._sizes or os.path.getsize(self._removed.name) < point["removed"]:
            self._removed.close()
            raise DataError(
                f"{self._prefix}: the files that an earlier run left are not what it wrote: {found} bytes, expected "
                f"{self._sizes}. Start over with --overwrite"
            )
        self._removed.truncate(point["removed"])
        for path in _unfinished(self._prefix):
            if path.name.endswith(".jsonl.zst") and path not in kept:
                path.unlink()
                self.leftovers = not self._journal.last

    def _open_part(self) -> BinaryIO:
        path = self._part(len(self._sizes))
        return zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(write_checksum=True))

    def _part(self, number: int) -> Path:
        return Path(f"{self._prefix}-{number:05d}{_UNFINISHED}jsonl.zst")


def publish(prefix: str, complete: dict[str, Any]) -> list[str]:
    """Give all files their final names, the report last, and return those with documents.

    It can be called again where it was interrupted.
    """
    names = [f"{prefix}-{number:05d}{_UNFINISHED}jsonl.zst" for number in range(complete["parts"])]
    rest = [f"{prefix}{_UNFINISHED}removed.jsonl", f"{prefix}{_UNFINISHED}cleaning.json"]
    new = {_final(name) for name in [*names, *rest] if not os.path.exists(name)}
    for path in complete["old"]:
        if path not in new:
            Path(path).unlink(missing_ok=True)
    for name in [*names, *rest]:
        if os.path.exists(name):
            os.replace(name, _final(name))
    Path(f"{prefix}{_UNFINISHED}seen").unlink(missing_ok=True)
    return [_final(name) for name in names]


def finished(prefix: str, run: str) -> tuple[list[str], int, int, Counter[str]] | None:
    """What this very run has published: files, documents, those that stay, and removed ones by reason."""
    try:
        report = json.loads(Path(f"{prefix}.cleaning.json").read_text(encoding="utf-8"))
        files = {f"{prefix}-{number:05d}.jsonl.zst": size for number, size in enumerate(report["bytes"])}
        same = report["run"] == run and all(os.path.getsize(path) == size for path, size in files.items())
        counts = report["documents"], report["kept"], Counter(report["removed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (list(files), *counts) if same else None


def _final(name: str) -> str:
    head, _, tail = name.rpartition(_UNFINISHED)
    return f"{head}.{tail}"


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _existing(prefix: str) -> list[Path]:
    found = [*_numbered(prefix, "jsonl.zst"), Path(f"{prefix}.removed.jsonl"), Path(f"{prefix}.cleaning.json")]
    return [path for path in found if path.exists()]


def _unfinished(prefix: str) -> list[Path]:
    rest = [Path(f"{prefix}{_UNFINISHED}{name}") for name in ("removed.jsonl", "cleaning.json", "seen")]
    return [*_numbered(prefix, f"{_UNFINISHED[1:]}jsonl.zst"), *rest]


def _numbered(prefix: str, suffix: str) -> Iterator[Path]:
    folder, name = Path(prefix).parent, glob.escape(Path(prefix).name)
    yield from sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].{suffix}"))
