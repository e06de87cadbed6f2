"""Writing PREFIX.bin, PREFIX.idx and PREFIX.json so that they appear complete or not at all."""

import contextlib
import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np

from megatron.data import manifest
from megatron.data.errors import DataError
from megatron.data.files import crc32, sha256, take_lock
from megatron.data.index_file import read_index, write_index

UNFINISHED = ".incomplete"
_SUFFIXES = (".bin", ".json", ".idx")  # in the order of publication: readers look for the .idx
_SCRATCH = (".lengths", ".ends")  # of sequences and documents; become the .idx


@dataclasses.dataclass(frozen=True)
class WriterState:
    """How far a dataset has been written: enough to go on from there, whatever was written after."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    crc32: int = 0
    """Of the .bin."""


class IndexedWriter:
    """One dataset under construction, beside its final place, under names that end in ``.incomplete.bin`` and so on.

    The final names do not exist until :meth:`publish`. A killed process leaves the unfinished files behind; the next
    writer of the same prefix continues from a :class:`WriterState` that was synced, or starts over. Memory use does not
    grow with the dataset.

    Args:
        prefix: path of the dataset without suffix.
        dtype: numpy type of a token; see :meth:`dtype_for`.
        overwrite: whether an existing dataset may be replaced.
        progress: where to go on.

    Raises:
        DataError: the dataset exists, another process is writing it, or its unfinished files are not what was synced.
    """

    def __init__(
        self, prefix: str, dtype: type[np.generic], overwrite: bool = False, progress: WriterState | None = None
    ) -> None:
        if not overwrite:
            check_free(prefix)
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.progress = progress or WriterState()
        self._unfinished = prefix + UNFINISHED
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(f"{self._unfinished}.bin", "ab")  # noqa: SIM115 - held until publish or discard
        try:
            take_lock(self._bin, prefix)
            if not overwrite:
                check_free(prefix)  # again: whoever had the lock may have published
        except BaseException:
            self._bin.close()
            raise
        self._lengths, self._ends = (
            open(f"{self._unfinished}{suffix}", "ab")  # noqa: SIM115 - as above
            for suffix in _SCRATCH
        )
        self.leftovers = progress is None and os.path.getsize(self._bin.name) > 0
        """A killed process left files that are started over."""
        self._rewind()

    @staticmethod
    def dtype_for(vocab_size: int) -> type[np.generic]:
        """The type Megatron stores tokens of such a vocabulary in: uint16 below 65 500 entries, else int32."""
        return np.uint16 if vocab_size < 65500 else np.int32

    @property
    def documents(self) -> int:
        return self.progress.documents

    @property
    def tokens(self) -> int:
        return self.progress.tokens

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents of one sequence each.

        Args:
            tokens: their token ids one after another, in the dataset's dtype.
            lengths: int array, tokens of each document. An empty document counts as one but has no sequence, as
                Megatron's tool writes it.
        """
        filled = lengths > 0
        self.add_sequences(tokens, lengths[filled], np.cumsum(filled))

    def add_sequences(self, tokens: bytes, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: as in :meth:`add`.
            lengths: int array, tokens of each sequence.
            ends: int array, how many of these sequences end with each document.
        """
        at = self.progress
        self._bin.write(tokens)
        self._lengths.write(lengths.astype(np.int32).tobytes())
        self._ends.write((ends.astype(np.int64) + at.sequences).tobytes())
        self.progress = WriterState(
            at.documents + len(ends),
            at.sequences + len(lengths),
            at.tokens + int(lengths.sum(dtype=np.int64)),
            zlib.crc32(tokens, at.crc32),
        )

    def sync(self) -> WriterState:
        """Bring everything to the disk; a later writer can go on from what this returns."""
        for file in (self._bin, self._lengths, self._ends):
            file.flush()
            os.fsync(file.fileno())
        return self.progress

    def finish(self, facts: manifest.DatasetManifest | None) -> None:
        """Write index and manifest, read the dataset back and bring all to the disk; still under unfinished names.

        Args:
            facts: the manifest, which gets the files' checksums; None makes none.

        Raises:
            DataError: the files do not hold what was added.
        """
        self.sync()
        lengths, ends = (
            np.memmap(f"{self._unfinished}{suffix}", dtype=dtype, mode="r") if count else np.empty(0, dtype)
            for suffix, dtype, count in (
                (".lengths", np.int32, self.progress.sequences),
                (".ends", np.int64, self.progress.documents),
            )
        )
        with open(f"{self._unfinished}.idx", "wb") as file:
            write_index(file, self.dtype, lengths, ends)
        self._verify()
        if facts:
            facts.checksums = {name: sha256(f"{self._unfinished}.{name}") for name in ("bin", "idx")}
            manifest.write(manifest.path_of(self._unfinished), facts)
        with open(f"{self._unfinished}.idx", "rb+") as file:
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give everything its final name. Call after :meth:`finish`."""
        publish(self.prefix)
        self.close()

    def close(self) -> None:
        """Let go of the files, and leave them where they are."""
        for file in (self._lengths, self._ends, self._bin):
            with contextlib.suppress(OSError):  # flushing to a full disk
                file.close()

    def discard(self) -> None:
        """Remove the unfinished files."""
        self.close()
        for suffix in (*_SUFFIXES, *_SCRATCH):
            Path(f"{self._unfinished}{suffix}").unlink(missing_ok=True)

    def _rewind(self) -> None:
        at = self.progress
        sizes = (at.tokens * self.dtype.itemsize, at.sequences * 4, at.documents * 8)
        for file, size in zip((self._bin, self._lengths, self._ends), sizes, strict=True):
            found = os.path.getsize(file.name)
            if found < size:
                self.close()
                raise DataError(f"{file.name} has {found} bytes, expected {size}: {_START_OVER}")
            file.truncate(size)
        if at.tokens and crc32(f"{self._unfinished}.bin") != at.crc32:
            self.close()
            raise DataError(f"{self._unfinished}.bin is not what was written: {_START_OVER}")

    def _verify(self) -> None:
        at = self.progress
        index = read_index(self._unfinished)
        found = (index.documents, len(index.lengths), index.tokens, crc32(f"{self._unfinished}.bin"))
        if found != dataclasses.astuple(at):
            raise DataError(
                f"{self._unfinished}: read back, documents, sequences, tokens and the CRC-32 of the .bin are {found}, "
                f"expected {dataclasses.astuple(at)}: the disk lost data"
            )


_START_OVER = "the disk lost data. Start over with --overwrite"


def publish(prefix: str) -> None:
    """Rename the verified unfinished files of ``prefix``, the .idx last; those that have their names already keep them.

    So it can be called again where it was interrupted.
    """
    unfinished = {suffix: Path(f"{prefix}{UNFINISHED}{suffix}") for suffix in _SUFFIXES}
    if unfinished[".bin"].exists():
        for suffix in (".idx", ".json"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)  # an old index must not stay beside new data
    for suffix, path in unfinished.items():
        if path.exists():
            os.replace(path, f"{prefix}{suffix}")
    for suffix in _SCRATCH:
        Path(f"{prefix}{UNFINISHED}{suffix}").unlink(missing_ok=True)
    folder = os.open(Path(prefix).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_free(prefix: str) -> None:
    """Raise DataError where a dataset ``prefix`` exists, whole or in part."""
    existing = [f"{prefix}{suffix}" for suffix in _SUFFIXES if os.path.lexists(f"{prefix}{suffix}")]
    if existing:
        raise DataError(f"{', '.join(existing)} exist already; give --overwrite or another --output-prefix")
