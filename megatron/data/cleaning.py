"""Leaving out documents that a model should not be trained on: of poor quality, or there already.

Quality is judged without a list of words or a language. Near duplicates are found by MinHash signatures of a document's
runs of five words and locality-sensitive hashing, both by rensa (an extra), which is written in Rust: datasketch does
the same in Python, many times slower, and datatrove brings a pipeline of its own with language models to load. A pair
of documents counts as near duplicates if their signatures say that they share more than ``near`` of all their runs
(Jaccard similarity); the first one stays.
"""

import dataclasses
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from megatron.data.duplicates import PERMUTATIONS, SEED, Duplicates, load_rensa
from megatron.data.errors import DataError
from megatron.data.files import check_prefix
from megatron.data.inputs import STANDARD_INPUT, UNREPEATABLE, find_inputs, spans_of, stamps_of
from megatron.data.journal import Journal
from megatron.data.jsonl import record_texts
from megatron.data.manifest import digest
from megatron.data.parts import Parts, finished, publish
from megatron.data.processes import in_order
from megatron.data.progress import ProgressBar
from megatron.data.reading import BATCH_BYTES, JSON, ROW, Batch, Position, read_batches

_RUN = 5  # words
_EARLY = "before its first file was full"
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
    existing: bool = False
    """The same run was made before, and there was nothing to do."""


@dataclasses.dataclass
class _FilteredDocument:
    """One record: the line to write, or why it has to go, and what duplicates are found by."""

    number: int
    line: bytes
    reason: str | None = None
    digest: bytes = b""
    signature: Any = None


class _DocumentFilter:
    """Looks at each document on its own; runs in worker processes."""

    def __init__(self, key: str, filters: Filters, near: float | None) -> None:
        self._key, self._filters, self._near = key, filters, near
        self._hashes: dict[str, int] = {}

    def __call__(self, batch: Batch) -> list[_FilteredDocument]:
        found: list[_FilteredDocument] = []
        runs: list[list[bytes]] = []
        for number, record in enumerate(batch.records, start=batch.first):
            try:
                texts = record_texts(record, batch.kind, (self._key,), number == 1 and batch.span.start == 0)
            except DataError as error:
                found.append(_FilteredDocument(number, b"", f"broken: {error}".partition(";")[0]))
                continue
            if texts is None:
                continue
            (text,) = texts
            filtered = _FilteredDocument(number, self._line(batch, record, text), self._filters.reason(text))
            if filtered.reason is None:
                filtered.digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if self._near is not None:
                    runs.append(self._runs(text))
            found.append(filtered)
        if runs:
            signatures = iter(load_rensa().RMinHash.from_token_sets(runs, PERMUTATIONS, SEED))
            for filtered in found:
                if filtered.reason is None:
                    filtered.signature = next(signatures)
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
    line of the first), and counted in OUTPUT_PREFIX.cleaning.json. The files get their names when all are complete. The
    same arguments go on with a run that was stopped after the last file that was full, unless they name standard input;
    ``workers``, ``overwrite`` and ``log_interval`` may change. Finished, there is nothing to do.

    Args:
        inputs: as of :func:`megatron.data.inputs.find_inputs`.
        output_prefix: path and beginning of the names.
        json_key: the field with the text.
        filters: quality filters.
        exact: leave out documents whose text was there before, letter by letter. 125 bytes of memory a document.
        near: leave out documents that are this similar to an earlier one; between 0 and 1, such as 0.8. 3.6 KB of
            memory a document.
        against: more files, whose documents count as earlier ones and are not written: held-out data, or corpora that
            are clean already.
        part_bytes: of text, after which a file of output is full.
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
        load_rensa()
    check_prefix(output_prefix)
    paths, others = find_inputs(inputs), find_inputs(against) if against else []
    if others and not exact and near is None:
        raise DataError("--against takes --exact-duplicates or --near-duplicates: what should be compared?")
    settings = {"exact": exact, "near": near, "filters": dataclasses.asdict(filters), "inputs": paths}
    stamps = {"inputs": stamps_of(paths), "against": stamps_of(others)}
    identity = settings | stamps | {"json_key": json_key, "part_bytes": part_bytes, "versions": _versions(near)}
    settings["run"] = digest(identity)

    def before() -> Cleaned | None:
        if overwrite or STANDARD_INPUT in (*paths, *others):  # nobody knows what stood there
            return None
        report = finished(output_prefix, settings["run"])
        return report and Cleaned(*report, existing=True)

    if not Journal.begun(f"{output_prefix}.cleaning") and (found := before()):
        return found
    with Journal(f"{output_prefix}.cleaning", identity, overwrite) as journal:
        if not journal.last and (found := before()):
            return found
        point = journal.last or {}
        counts = point.get("counts", {"documents": 0, "kept": 0, "removed": {}})
        done = Cleaned([], counts["documents"], counts["kept"], Counter(counts["removed"]))
        if "complete" in point:  # nothing but the names is missing
            done.files = publish(output_prefix, point["complete"])
            journal.remove()
            return done
        with Parts(output_prefix, part_bytes, overwrite, journal) as writer:
            spans, piped = spans_of(paths), STANDARD_INPUT in paths
            if point:
                print(f"going on after {done.documents:,} documents of an earlier run", file=sys.stderr)
            elif writer.leftovers:
                print(f"an earlier run was stopped {UNREPEATABLE if piped else _EARLY}: starting over", file=sys.stderr)

            def save(position: Position) -> None:
                if not piped:
                    writer.save({"position": dataclasses.asdict(position), "counts": _counts(done)} | duplicates.sync())

            with (
                in_order(_DocumentFilter, (json_key, filters, near), workers) as apply,
                Duplicates(output_prefix, exact, near, point.get("seen")) as duplicates,
                ProgressBar(sum(span.size for span in spans), log_interval) as bar,
            ):
                if not point and others:
                    for batch, filtered_batch in apply(read_batches(spans_of(others), (json_key,))):
                        for filtered in filtered_batch:
                            if filtered.reason is None:
                                duplicates.reason(
                                    filtered.digest, filtered.signature, f"{batch.span.path}:{filtered.number}"
                                )
                    save(Position())
                batch_bytes = min(BATCH_BYTES, part_bytes)  # files end where batches do
                start = Position(**point.get("position", {}))
                batches = read_batches(spans, (json_key,), start=start, batch_bytes=batch_bytes)
                for batch, filtered_batch in apply(batches):
                    _keep_or_remove(batch.span.path, filtered_batch, duplicates, writer, done)
                    if writer.full:
                        writer.close_part()
                        save(batch.end)
                    size = sum(len(filtered.line) for filtered in filtered_batch)
                    bar.update(batch.consumed, len(filtered_batch), size, sum(done.removed.values()))
            if stamps != {"inputs": stamps_of(paths), "against": stamps_of(others)}:
                raise DataError("--input: a file was changed while it was read; run again when nobody writes to it")
            if not done.kept:
                raise DataError(f"not one of {done.documents} documents stays: {dict(done.removed)}")
            done.files = writer.publish(_counts(done), settings)
        return done


def _keep_or_remove(
    path: str, filtered_batch: Sequence[_FilteredDocument], duplicates: Duplicates, writer: Parts, done: Cleaned
) -> None:
    for filtered in filtered_batch:
        reason, first = filtered.reason, None
        if reason is None:
            reason, first = duplicates.reason(filtered.digest, filtered.signature, f"{path}:{filtered.number}")
        if reason is None:
            writer.add(filtered.line)
            done.kept += 1
        else:
            writer.remove(path, filtered.number, reason, first)
            done.removed[reason.partition(":")[0]] += 1
    done.documents += len(filtered_batch)


def _counts(done: Cleaned) -> dict[str, Any]:
    return {"documents": done.documents, "kept": done.kept, "removed": dict(done.removed)}


def _versions(near: float | None) -> dict[str, str]:
    return {} if near is None else {"rensa": metadata.version("rensa")}
