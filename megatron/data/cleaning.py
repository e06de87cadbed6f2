"""Leaving out documents that a model should not be trained on: of poor quality, or there already.

Quality is judged without a list of words or a language. Near duplicates are found by MinHash signatures of a document's
runs of five words and locality-sensitive hashing, both by rensa (an extra), which is written in Rust: datasketch does
the same in Python, many times slower, and datatrove brings a pipeline of its own with language models to load. A pair
of documents counts as near duplicates if their signatures say that they share more than ``near`` of all their runs
(Jaccard similarity); the first one stays.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megatron.data.errors import DataError
from megatron.data.inputs import find_inputs, spans_of
from megatron.data.jsonl import record_texts
from megatron.data.processes import in_order
from megatron.data.progress import Progress
from megatron.data.reading import JSON, ROW, Batch, read_batches

_PERMUTATIONS, _BANDS, _SEED, _RUN = 128, 32, 42, 5
_WORD = re.compile(r"[\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff]|\w+")  # scripts without spaces character by character


@dataclasses.dataclass(frozen=True)
class Filters:
    """What a document must be to stay; the defaults let everything pass."""

    min_characters: int = 0
    max_characters: int | None = None
    min_alphanumeric: float = 0.0
    """Share of letters and digits among the characters that are no white space."""
    max_repeated_lines: float = 1.0
    """Share of lines, empty ones left out, that stood in the document before."""
    max_compression: float | None = None
    """How many times smaller zlib makes it; menus, tables and generated text compress far better than prose."""

    def reason(self, text: str) -> str | None:
        """Why ``text`` has to go; None where it may stay."""
        if len(text) < self.min_characters:
            return "too short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too long"
        if self.min_alphanumeric > 0:
            characters = "".join(text.split())
            if sum(map(str.isalnum, characters)) < self.min_alphanumeric * len(characters):
                return "too few letters and digits"
        if self.max_repeated_lines < 1:
            lines = [line for line in map(str.strip, text.split("\n")) if line]
            if len(lines) - len(set(lines)) > self.max_repeated_lines * len(lines):
                return "repeated lines"
        if self.max_compression is not None:
            data = text.encode()
            if len(data) > self.max_compression * len(zlib.compress(data, 1)):
                return "repetitive: compresses too well"
        return None


@dataclasses.dataclass
class Cleaned:
    """What became of a corpus."""

    files: list[str]
    documents: int = 0
    kept: int = 0
    removed: Counter[str] = dataclasses.field(default_factory=Counter)
    """Documents by reason."""


@dataclasses.dataclass
class _Judged:
    """One record: the line to write, or why it has to go, and what duplicates are found by."""

    number: int
    line: bytes
    reason: str | None = None
    digest: bytes = b""
    signature: Any = None


class _Judge:
    """Looks at each document on its own; runs in worker processes."""

    def __init__(self, key: str, filters: Filters, near: float | None) -> None:
        self._key, self._filters, self._near = key, filters, near
        self._hashes: dict[str, int] = {}

    def __call__(self, batch: Batch) -> list[_Judged]:
        found: list[_Judged] = []
        runs: list[list[bytes]] = []
        for number, record in enumerate(batch.records, start=batch.first):
            try:
                texts = record_texts(record, batch.kind, (self._key,), number == 1 and batch.span.start == 0)
            except DataError as error:
                found.append(_Judged(number, b"", f"broken: {error}".partition(";")[0]))
                continue
            if texts is None:
                continue
            (text,) = texts
            judged = _Judged(number, self._line(batch, record, text), self._filters.reason(text))
            if judged.reason is None:
                judged.digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if self._near is not None:
                    runs.append(self._runs(text))
            found.append(judged)
        if runs:
            import rensa

            signatures = iter(rensa.RMinHash.from_token_sets(runs, _PERMUTATIONS, _SEED))
            for judged in found:
                if judged.reason is None:
                    judged.signature = next(signatures)
        return found

    def _line(self, batch: Batch, record: Any, text: str) -> bytes:
        if batch.kind == JSON:
            return record.removeprefix(b"\xef\xbb\xbf").strip() + b"\n"
        fields = record if batch.kind == ROW else {self._key: text}
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"

    def _runs(self, text: str) -> list[bytes]:
        """The different runs of words, each as eight bytes."""
        words = _WORD.findall(text.lower())
        hashes = np.fromiter(map(self._hash, words), dtype=np.uint64, count=len(words))
        mixed = np.zeros(max(len(words) - _RUN + 1, 1), dtype=np.uint64)
        for place in range(min(_RUN, len(words))):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(mixed)]
        return np.unique(mixed).view("V8").tolist()

    def _hash(self, word: str) -> int:
        found = self._hashes.get(word)
        if found is None:
            if len(self._hashes) > 1 << 18:
                self._hashes.clear()
            found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self._hashes[word] = found
        return found


class _Duplicates:
    """Remembers documents; says of which earlier one the next is a copy."""

    def __init__(self, exact: bool, near: float | None) -> None:
        self._seen: dict[bytes, None] | None = {} if exact else None
        self._index = None
        if near is not None:
            import rensa

            self._index = rensa.RMinHashDeduplicator(near, _PERMUTATIONS, True, _BANDS, _SEED)

    def reason(self, judged: _Judged, place: str) -> tuple[str | None, str | None]:
        """Why a document has to go, and where the other one stands if that is known."""
        if self._seen is not None:
            if judged.digest in self._seen:
                return "exact duplicate", None
            self._seen[judged.digest] = None
        if self._index is not None and not self._index.add(place, judged.signature):
            return "near duplicate", min(self._index.get_duplicates(judged.signature))
        return None, None


def clean(
    inputs: Sequence[str],
    output_prefix: str,
    *,
    json_key: str = "text",
    filters: Filters | None = None,
    exact: bool = False,
    near: float | None = None,
    against: Sequence[str] = (),
    part_bytes: int = 1 << 30,
    workers: int = 1,
    overwrite: bool = False,
    log_interval: int = 10_000,
) -> Cleaned:
    """Write the documents that stay as ``OUTPUT_PREFIX-00000.jsonl.zst`` and so on, in their order.

    What was removed is listed in OUTPUT_PREFIX.removed.jsonl (file, line, reason, and for near duplicates the file and
    line of the first), and counted in OUTPUT_PREFIX.cleaning.json. The files get their names when all are complete.

    Args:
        inputs: as of :func:`megatron.data.inputs.find_inputs`.
        output_prefix: path and beginning of the names.
        json_key: the field with the text.
        filters: quality filters.
        exact: leave out documents whose text was there before, letter by letter. 100 bytes of memory a document.
        near: leave out documents that are this similar to an earlier one; between 0 and 1, such as 0.8. 3 KB of memory
            a document.
        against: more files, whose documents count as earlier ones and are not written: held-out data, or corpora that
            are clean already.
        part_bytes: of text in one file of output.
        workers: processes that read and hash; the comparison is this one's.
        overwrite: whether existing output may be replaced.
        log_interval: documents between two lines of progress where there is no terminal.

    Raises:
        DataError: inputs, flags or output are wrong, or no document stays.
    """
    filters = filters or Filters()
    if near is not None:
        if not 0 < near < 1:
            raise DataError(f"--near-duplicates {near}: expected a similarity between 0 and 1, such as 0.8")
        try:
            import rensa  # noqa: F401
        except ImportError as error:
            raise DataError('--near-duplicates needs rensa; pip install "megatron-moe[data]"') from error
    spans = spans_of(find_inputs(inputs))
    others = spans_of(find_inputs(against)) if against else []
    if others and not exact and near is None:
        raise DataError("--against takes --exact-duplicates or --near-duplicates: what should be compared?")
    writer = _Parts(output_prefix, part_bytes, overwrite)
    done = Cleaned([])
    try:
        with (
            in_order(_Judge, (json_key, filters, near), workers) as judge,
            Progress(sum(span.size for span in spans), log_interval) as bar,
        ):
            duplicates = _Duplicates(exact, near)
            for batch, judged_batch in judge(read_batches(others, (json_key,))):
                for judged in judged_batch:
                    if judged.reason is None:
                        duplicates.reason(judged, f"{batch.span.path}:{judged.number}")
            for batch, judged_batch in judge(read_batches(spans, (json_key,))):
                for judged in judged_batch:
                    place = f"{batch.span.path}:{judged.number}"
                    reason, first = judged.reason, None
                    if reason is None:
                        reason, first = duplicates.reason(judged, place)
                    if reason is None:
                        writer.add(judged.line)
                        done.kept += 1
                    else:
                        writer.remove(batch.span.path, judged.number, reason, first)
                        done.removed[reason.partition(":")[0]] += 1
                done.documents += len(judged_batch)
                size = sum(len(judged.line) for judged in judged_batch)
                bar.update(batch.consumed, len(judged_batch), size, sum(done.removed.values()))
        if not done.kept:
            raise DataError(f"not one of {done.documents} documents stays: {dict(done.removed)}")
        settings = {
            "exact": exact,
            "near": near,
            "filters": dataclasses.asdict(filters),
            "inputs": [s.path for s in spans],
        }
        done.files = writer.publish(done, settings)
    except BaseException:
        writer.discard()
        raise
    return done


class _Parts:
    """The output files, under unfinished names until :meth:`publish`."""

    def __init__(self, prefix: str, part_bytes: int, overwrite: bool) -> None:
        self._prefix, self._part_bytes = Path(prefix), part_bytes
        old = [*_parts_of(self._prefix), Path(f"{prefix}.removed.jsonl"), Path(f"{prefix}.cleaning.json")]
        self._old = [path for path in old if path.exists()]
        if self._old and not overwrite:
            raise DataError(
                f"{', '.join(map(str, self._old))} exist already; give --overwrite or another --output-prefix"
            )
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._removed = open(f"{prefix}.incomplete.removed.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - see publish
        self._parts: list[Path] = []
        self._file: io.BufferedIOBase | None = None
        self._size = 0

    def add(self, line: bytes) -> None:
        if self._file is None or self._size + len(line) > self._part_bytes:
            self._close()
            self._parts.append(Path(f"{self._prefix}-{len(self._parts):05d}.incomplete.jsonl.zst"))
            self._file = zstandard.open(self._parts[-1], "wb", cctx=zstandard.ZstdCompressor(write_checksum=True))
            self._size = 0
        self._file.write(line)
        self._size += len(line)

    def remove(self, path: str, number: int, reason: str, first: str | None) -> None:
        record = {"file": path, "line": number, "reason": reason} | ({"like": first} if first else {})
        self._removed.write(json.dumps(record, ensure_ascii=False) + "\n")

    def publish(self, done: Cleaned, settings: dict[str, Any]) -> list[str]:
        self._close()
        self._removed.close()
        counts = {"documents": done.documents, "kept": done.kept, "removed": dict(done.removed)}
        report = Path(f"{self._prefix}.incomplete.cleaning.json")
        report.write_text(json.dumps(counts | settings, indent=2) + "\n", encoding="utf-8")
        for path in self._old:
            path.unlink()
        for path in [*self._parts, Path(self._removed.name), report]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, str(path).replace(".incomplete.", "."))
        return [str(path).replace(".incomplete.", ".") for path in self._parts]

    def discard(self) -> None:
        self._close()
        self._removed.close()
        report = Path(f"{self._prefix}.incomplete.cleaning.json")
        for path in [*self._parts, Path(self._removed.name), report]:
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _parts_of(prefix: Path) -> Iterator[Path]:
    yield from sorted(prefix.parent.glob(f"{prefix.name}-[0-9][0-9][0-9][0-9][0-9].jsonl.zst"))
