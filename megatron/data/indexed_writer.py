"""Writing PREFIX.bin, PREFIX.idx and PREFIX.json so that they appear complete or not at all."""

import contextlib
import os
from pathlib import Path

import numpy as np

from megatron.data import manifest
from megatron.data.errors import DataError

try:
    import fcntl
except ImportError:  # no such locks on this platform
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".incomplete"
_SUFFIXES = (".bin", ".json", ".idx")  # in the order of publication: readers look for the .idx


class IndexedWriter:
    """One dataset under construction, beside its final place, under names that end in ``.incomplete.bin`` and so on.

    Nothing stands under the final names until :meth:`publish`. A killed process leaves the unfinished files behind; the
    next writer of the same prefix starts them over.

    Args:
        prefix: path of the dataset without suffix.
        dtype: numpy type of a token; see :meth:`dtype_for`.
        overwrite: whether an existing dataset may be replaced.

    Raises:
        DataError: the dataset exists, or another process is writing it.
    """

    def __init__(self, prefix: str, dtype: type[np.generic], overwrite: bool = False) -> None:
        from megatron.data.core_datasets import IndexedDatasetBuilder

        if not overwrite:
            check_free(prefix)
        self.prefix, self.dtype = prefix, dtype
        self.documents, self.tokens = 0, 0
        self._unfinished = prefix + _UNFINISHED
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(f"{self._unfinished}.bin", "ab")  # noqa: SIM115 - held until publish or discard
        self._take_lock()
        self._builder = IndexedDatasetBuilder(f"{self._unfinished}.bin", dtype=dtype)

    @staticmethod
    def dtype_for(vocab_size: int) -> type[np.generic]:
        """The type Megatron stores tokens of such a vocabulary in: uint16 below 65 500 entries, else int32."""
        return np.uint16 if vocab_size < 65500 else np.int32

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: their token ids one after another, in the dataset's dtype.
            lengths: int array, tokens of each document. An empty document counts as one but has no sequence, as
                Megatron's tool writes it.
        """
        builder = self._builder
        builder.data_file.write(tokens)
        filled = lengths > 0
        ends = len(builder.sequence_lengths) + np.cumsum(filled)
        builder.sequence_lengths.extend(lengths[filled].tolist())
        builder.document_indices.extend(ends.tolist())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())

    def finish(self, facts: manifest.Manifest) -> None:
        """Write index and manifest, read the dataset back and bring all to the disk; still under unfinished names.

        Raises:
            DataError: the files do not hold what was added.
        """
        self._builder.finalize(f"{self._unfinished}.idx")
        manifest.write(manifest.path_of(self._unfinished), facts)
        self._verify()
        for suffix in _SUFFIXES:
            with open(f"{self._unfinished}{suffix}", "rb+") as file:
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename everything to its final name; the .idx last. Call after :meth:`finish`."""
        for suffix in reversed(_SUFFIXES):  # a crash in between must not leave an old index on new data
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix in _SUFFIXES:
            os.replace(f"{self._unfinished}{suffix}", f"{self.prefix}{suffix}")
        self._lock.close()
        folder = os.open(Path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove the unfinished files."""
        with contextlib.suppress(OSError):  # flushing to a full disk
            self._builder.data_file.close()
        for suffix in _SUFFIXES:
            Path(f"{self._unfinished}{suffix}").unlink(missing_ok=True)
        self._lock.close()

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"{self.prefix}: another process is writing this dataset; wait for it or give another --output-prefix"
            ) from None
        except OSError:  # a file system without locks
            return

    def _verify(self) -> None:
        from megatron.data.core_datasets import IndexedDataset

        size = os.path.getsize(f"{self._unfinished}.bin")
        expected = self.tokens * np.dtype(self.dtype).itemsize
        if size != expected:
            raise DataError(f"{self._unfinished}.bin has {size} bytes, expected {expected}: the disk lost data")
        if self.tokens:
            dataset = IndexedDataset(self._unfinished)
            found = (len(dataset.document_indices) - 1, int(dataset.sequence_lengths.sum(dtype=np.int64)))
            if found != (self.documents, self.tokens):
                raise DataError(
                    f"{self._unfinished}.idx holds {found[0]} documents and {found[1]} tokens, "
                    f"expected {self.documents} and {self.tokens}: the disk lost data"
                )


def check_free(prefix: str) -> None:
    """Raise DataError where a dataset ``prefix`` exists, whole or in part."""
    existing = [f"{prefix}{suffix}" for suffix in _SUFFIXES if os.path.exists(f"{prefix}{suffix}")]
    if existing:
        raise DataError(f"{', '.join(existing)} exist already; give --overwrite or another --output-prefix")
