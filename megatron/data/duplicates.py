"""Exact and near duplicates of earlier documents; what is known of them is kept in a file."""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from megatron.data.errors import DataError

PERMUTATIONS, SEED = 128, 42
_BANDS = 32
_HEAD = struct.Struct("<16sHH")  # digest, bytes of the location, bytes of the signature


def load_rensa() -> Any:
    """The module rensa, which is compiled and has no annotations.

    Raises:
        DataError: it is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        raise DataError('--near-duplicates needs rensa; pip install "megatron-moe[data]"') from error
    return rensa


class Duplicates:
    """Remembers documents; says of which earlier one the next is a copy.

    All that is remembered is also in PREFIX.incomplete.seen, so that a run that was stopped need not compute it anew.

    Args:
        prefix: the run's --output-prefix.
        exact: whether texts that are the same are found.
        near: similarity above which texts are near duplicates; None finds none.
        size: how much of the file an earlier run had synced.

    Raises:
        DataError: that much is not there.
    """

    def __init__(self, prefix: str, exact: bool, near: float | None, size: int | None) -> None:
        self._exact, self._seen, self._index = exact, set(), None
        if near is not None:
            self._index = load_rensa().RMinHashDeduplicator(near, PERMUTATIONS, True, _BANDS, SEED)
        self.path = Path(f"{prefix}.incomplete.seen")
        self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 - closed on exit
        try:
            self._replay(size or 0)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def reason(self, digest: bytes, signature: Any, location: str) -> tuple[str | None, str | None]:
        """Why a document has to go, and the location of the other one if it is known.

        Args:
            digest: 16 bytes, a checksum of the text.
            signature: rensa's, of the text's runs of words; None where near duplicates are not looked for.
            location: file and number of the document.
        """
        if self._exact and digest in self._seen:
            return "exact duplicate", None
        like = self._add(digest, signature, location)
        if like is not None:
            signature = None
        if self._exact or signature is not None:
            state = b"" if signature is None else signature.__getstate__()
            name = b"" if signature is None else os.fsencode(location)
            self._file.write(_HEAD.pack(digest, len(name), len(state)) + name + state)
        return (None, None) if like is None else ("near duplicate", like)

    def sync(self) -> dict[str, int]:
        """Bring all to the disk; the size is what a later run goes on from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"seen": os.path.getsize(self.path)}

    def _add(self, digest: bytes, signature: Any, location: str) -> str | None:
        """Remember a document, unless it is like another one, whose location is returned."""
        if self._exact:
            self._seen.add(digest)
        if self._index is None or signature is None or self._index.add(location, signature):
            return None
        return min(self._index.get_duplicates(signature))

    def _replay(self, size: int) -> None:
        if os.path.getsize(self.path) < size:
            raise DataError(f"{self.path} is shorter than it was: the disk lost data. Start over with --overwrite")
        self._file.truncate(size)
        with open(self.path, "rb") as file:
            while head := file.read(_HEAD.size):
                digest, named, signed = _HEAD.unpack(head)
                location, state = os.fsdecode(file.read(named)), file.read(signed)
                self._add(digest, _signature(state), location)


def _signature(state: bytes) -> Any:
    """rensa's signature from its own bytes; they are numbers, never code."""
    if not state:
        return None
    signature = load_rensa().RMinHash(PERMUTATIONS, SEED)
    signature.__setstate__(state)
    return signature
