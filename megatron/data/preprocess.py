"""A corpus -> tokens -> Megatron's .bin/.idx.

This process reads records and writes tokens; workers parse and tokenize (:mod:`megatron.data.encoding`). Every few
seconds what was written is brought to the disk and noted in a journal, so that the same command goes on from there
after a kill. Final names appear when all is complete and verified.
"""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.config import DataConfig
from megatron.data import indexed_writer, manifest, rejects
from megatron.data.encoding import EncodedBatch, make_encoder
from megatron.data.errors import DataError
from megatron.data.files import check_prefix
from megatron.data.index_file import read_index
from megatron.data.indexed_writer import IndexedWriter, check_free
from megatron.data.inputs import (
    STANDARD_INPUT,
    UNREPEATABLE,
    Checksums,
    Span,
    empty_shards,
    find_inputs,
    spans_of,
    stamps_of,
)
from megatron.data.journal import Journal
from megatron.data.processes import in_order
from megatron.data.progress import ProgressBar
from megatron.data.reading import TEXT_DOCUMENTS, Batch, Position, read_batches
from megatron.data.rejects import Rejects
from megatron.data.tokenizer import Tokenizer, build_tokenizer

JOURNAL_SECONDS = 10.0


@dataclasses.dataclass
class Summary:
    """What a preprocessing run did."""

    prefixes: list[str]
    documents: int = 0
    tokens: int = 0
    rejected: int = 0
    rejected_file: str | None = None
    existing: bool = False
    """The same run was made before, and there was nothing to do."""


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    data: DataConfig,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    text_documents: str = "file",
    workers: int = 1,
    max_rejected: float = 0.001,
    num_shards: int = 1,
    shard_index: int = 0,
    overwrite: bool = False,
    log_interval: int = 10_000,
) -> Summary:
    """Tokenize a corpus into one dataset for each key, ``OUTPUT_PREFIX_KEY_document``.

    A run that did not finish is gone on with by the same arguments, and one that did is left as it is. ``workers``,
    ``max_rejected``, ``overwrite`` and ``log_interval`` may change.

    Args:
        inputs: files, glob patterns, folders, or ``-`` for JSON lines from standard input; see
            :func:`megatron.data.inputs.find_inputs`.
        output_prefix: path and beginning of the name of what is written.
        data: the tokenizer's flags.
        json_keys: fields of a record to take; each makes its own dataset.
        append_eod: whether an end-of-document token follows each document that is not empty.
        text_documents: whether each ``file`` or each ``line`` of a .txt file is a document.
        workers: tokenizing processes; 0 tokenizes in this one.
        max_rejected: largest share of broken records that is tolerated. They are listed in
            OUTPUT_PREFIX.rejected.jsonl.
        num_shards: make one of so many shards, under ``OUTPUT_PREFIX-00002-of-00016``; merged, they are the dataset
            that one run makes.
        shard_index: which one, from 0.
        overwrite: whether existing output may be replaced, and another run's unfinished work dropped.
        log_interval: documents between two lines of progress where there is no terminal.

    Raises:
        DataError: inputs, flags, output or too many records are wrong. Nothing then has the final names.
    """
    if len(set(json_keys)) < len(json_keys):
        raise DataError(f"--json-keys {' '.join(json_keys)}: a key is given more than once")
    if unfit := [key for key in json_keys if os.sep in key or not key]:
        raise DataError(f"--json-keys {' '.join(unfit)}: a key becomes part of a file's name, so without {os.sep}")
    check_prefix(output_prefix)
    if text_documents not in TEXT_DOCUMENTS:
        raise DataError(f"--text-documents {text_documents}: expected one of {', '.join(TEXT_DOCUMENTS)}")
    paths = find_inputs(inputs)
    spans = spans_of(paths, num_shards, shard_index, by_line=text_documents == "line")
    stamps = stamps_of(paths)
    if note := empty_shards(paths, num_shards, by_line=text_documents == "line"):
        print(f"warning: {note}", file=sys.stderr)
    if num_shards > 1:
        output_prefix = f"{output_prefix}-{shard_index:05d}-of-{num_shards:05d}"
    prefixes = [f"{output_prefix}_{key}_document" for key in json_keys]
    tokenizer = build_tokenizer(data)
    flags = {
        "json_keys": list(json_keys),
        "append_eod": append_eod,
        "text_documents": text_documents,
        "tokenizer": manifest.describe_tokenizer(tokenizer),
    }
    command = manifest.digest(flags | {"inputs": [stamp[:2] for stamp in stamps], "shards": num_shards})
    shard = {"index": shard_index, "count": num_shards} if num_shards > 1 else None
    identity = flags | {"inputs": stamps, "shard": shard, "versions": manifest.versions()}
    total_bytes = sum(span.end - span.start for span in spans)
    listed = Rejects(output_prefix, max_rejected, total_bytes)

    def finished() -> Summary | None:
        return None if overwrite else _finished(output_prefix, prefixes, command, shard, stamps)

    if not Journal.begun(output_prefix) and (found := finished()):
        return found  # before anything is written: finished datasets may be where nobody can
    with Journal(output_prefix, identity, overwrite) as journal:
        if journal.last and "verified" in journal.last:  # nothing but the names is missing
            return _publish(journal, output_prefix, prefixes)
        if found := finished():
            return found
        if not overwrite:
            for prefix in prefixes:
                check_free(prefix)
            listed.check_free()
        with _Run(journal, listed, prefixes, tokenizer, overwrite, STANDARD_INPUT in paths) as run:
            with (
                in_order(make_encoder, (data, tuple(json_keys), append_eod), workers) as encode,
                ProgressBar(total_bytes, log_interval) as bar,
            ):
                batches = encode(read_batches(spans, json_keys, text_documents=text_documents, start=run.position))
                digests = _write(run, batches, bar, spans)
            if stamps_of(paths) != stamps:
                raise DataError("--input: a file was changed while it was read; run again when nobody writes to it")
            for key, writer in zip(json_keys, run.writers, strict=True):
                if writer.tokens == 0 and num_shards == 1:
                    raise DataError(f"--input: not one token under the key {key!r} in {len(paths)} file(s)")
                writer.finish(
                    manifest.DatasetManifest(
                        tokenizer=manifest.describe_tokenizer(tokenizer),
                        json_key=key,
                        append_eod=append_eod,
                        dtype=writer.dtype.name,
                        documents=writer.documents,
                        tokens=writer.tokens,
                        rejected=listed.count,
                        inputs=_describe(spans, digests),
                        shard=shard,
                        command=command,
                    )
                )
            run.verified()
            return _publish(journal, output_prefix, prefixes)


def _write(
    run: "_Run", batches: Iterator[tuple[Batch, EncodedBatch]], bar: ProgressBar, spans: Sequence[Span]
) -> list[str]:
    """Write all batches; returns the SHA-256 of each span."""
    piped = hashlib.sha256()
    checksums = Checksums(spans)
    try:
        for batch, encoded in batches:
            run.add(batch, encoded)
            if batch.span.path == STANDARD_INPUT:
                piped.update(b"".join(batch.records))
            bar.update(batch.consumed, len(encoded.lengths[0]), encoded.text_bytes, run.rejects.count)
        run.rejects.check()
        found = checksums.result()
    finally:
        checksums.cancel()
    return [piped.hexdigest()] if any(span.path == STANDARD_INPUT for span in spans) else found


class _Run:
    """The files under construction, and the journal that goes with them."""

    def __init__(
        self,
        journal: Journal,
        listed: Rejects,
        prefixes: Sequence[str],
        tokenizer: Tokenizer,
        overwrite: bool,
        piped: bool,
    ) -> None:
        self._journal, self.rejects, self._piped = journal, listed, piped
        self._point: dict[str, Any] = journal.last or {}
        self.position = Position(**self._point.get("position", {}))
        self.writers: list[IndexedWriter] = []
        self._due = time.monotonic() + JOURNAL_SECONDS
        done = self._point.get("writers", [{}] * len(prefixes))
        dtype = IndexedWriter.dtype_for(tokenizer.vocab_size)
        try:
            for prefix, progress in zip(prefixes, done, strict=True):
                at = indexed_writer.WriterState(**progress) if progress else None
                self.writers.append(IndexedWriter(prefix, dtype, overwrite, at))
            if journal.last is None:
                journal.remove()  # another run's, to be overwritten
            listed.open(self._point.get("rejects"))
        except BaseException:
            self._end(keep=journal.last is not None)
            raise
        if not self._point and self.writers[0].leftovers:
            how = UNREPEATABLE if piped else "before it had noted how far it was"
            print(f"an earlier run was stopped {how}: starting over", file=sys.stderr)
        if self._point:
            print(f"going on after {self.writers[0].documents:,} documents of an earlier run", file=sys.stderr)

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.rejects.close()
        keep = self._journal.last is not None
        self._end(keep)
        if keep and error:
            print(f"what was done is kept ({self._journal.path}): the same command goes on", file=sys.stderr)

    def add(self, batch: Batch, encoded: EncodedBatch) -> None:
        """Write what became of a batch, and note it in the journal when it is time."""
        for writer, tokens, lengths in zip(self.writers, encoded.tokens, encoded.lengths, strict=True):
            writer.add(tokens, lengths)
        self.rejects.add(batch, encoded.rejected)
        if time.monotonic() >= self._due and not self._piped:
            self._save({"position": dataclasses.asdict(batch.end)})
            self._due = time.monotonic() + JOURNAL_SECONDS

    def verified(self) -> None:
        """Note that nothing but the final names is missing."""
        self._save({"verified": True})

    def _save(self, point: dict[str, Any]) -> None:
        state = {"writers": [dataclasses.asdict(writer.sync()) for writer in self.writers]}
        self._journal.save(point | state | {"rejects": self.rejects.sync()})

    def _end(self, keep: bool) -> None:
        for writer in self.writers:
            if keep:
                writer.close()
            else:
                writer.discard()


def _publish(journal: Journal, output_prefix: str, prefixes: Sequence[str]) -> Summary:
    """Give everything its final name, where an interrupted run did not."""
    point = journal.last
    assert point is not None  # saved by _Run.verified
    for prefix in prefixes:
        indexed_writer.publish(prefix)
    rejected = point["rejects"]["count"]
    rejected_file = rejects.publish(output_prefix, rejected)
    journal.remove()
    tokens = sum(writer["tokens"] for writer in point["writers"])
    return Summary(list(prefixes), point["writers"][0]["documents"], tokens, rejected, rejected_file)


def _finished(
    output_prefix: str, prefixes: Sequence[str], command: str, shard: dict[str, int] | None, stamps: list[list[Any]]
) -> Summary | None:
    """The files under the final names, if this run made them from these inputs."""
    try:
        found = [manifest.read(prefix) for prefix in prefixes]
        for prefix in prefixes:
            read_index(prefix)
    except DataError:
        return None
    facts = [entry for entry in found if entry and entry.command == command and entry.shard == shard]
    if len(facts) < len(prefixes) or not stamps or any(entry.versions != manifest.versions() for entry in facts):
        return None
    made = min(os.stat(f"{prefix}.idx").st_mtime_ns for prefix in prefixes)
    if made < max(changed for _, _, changed in stamps):
        return None
    rejected_file = f"{output_prefix}.rejected.jsonl" if facts[0].rejected else None
    tokens = sum(entry.tokens for entry in facts)
    return Summary(list(prefixes), facts[0].documents, tokens, facts[0].rejected, rejected_file, existing=True)


def _describe(spans: Sequence[Span], digests: Sequence[str]) -> list[dict[str, Any]]:
    """The manifest's section about the inputs."""
    return [
        {"path": span.path, "bytes": span.size, "sha256": digest}
        | ({} if span.whole else {"start": span.start, "end": span.end})
        for span, digest in zip(spans, digests, strict=True)
    ]
