"""JSON lines -> tokens -> Megatron's .bin/.idx.

This process reads lines and writes tokens; worker processes parse and tokenize. What travels between them are batches
of raw lines one way and arrays of tokens the other, never single documents. Batches are written in the order in which
they were read, so the files do not depend on the number of workers.
"""

import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from megatron.config import DataConfig
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter, check_free
from megatron.data.jsonl import LineBatch, check_inputs, document_texts, read_batches
from megatron.data.manifest import Manifest, describe_tokenizer
from megatron.data.processes import end_with_parent
from megatron.data.progress import Progress
from megatron.data.tokenizer import Tokenizer, build_tokenizer

_QUEUED_PER_WORKER = 4
_EXAMPLES = 3


@dataclasses.dataclass
class EncodedBatch:
    """What became of one :class:`LineBatch`."""

    tokens: list[bytes]
    """Per JSON key, the tokens of all documents one after another."""
    lengths: list[np.ndarray]
    """Per JSON key, int32 tokens of each document."""
    text_bytes: int
    rejected: list[tuple[int, str, str]]
    """Line number, reason and the line itself."""


@dataclasses.dataclass
class Summary:
    """What a preprocessing run did."""

    prefixes: list[str]
    documents: int = 0
    tokens: int = 0
    rejected: int = 0
    rejected_file: str | None = None


class LineEncoder:
    """Turns batches of JSON lines into tokens."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._keys = tokenizer, tuple(keys)
        self._end = [tokenizer.eod] if append_eod else []
        self._dtype = IndexedWriter.dtype_for(tokenizer.vocab_size)

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        rejected = []
        documents: list[list[str]] = []
        for number, line in enumerate(batch.lines, start=batch.first):
            try:
                texts = document_texts(line, self._keys, first_line=number == 1)
            except DataError as error:
                rejected.append((number, str(error), line.decode("utf-8", "backslashreplace").rstrip("\r\n")))
                continue
            if texts is not None:
                documents.append(texts)
        tokens, lengths = [], []
        for texts in zip(*documents, strict=True) if documents else [()] * len(self._keys):
            ids = [sequence + self._end if sequence else sequence for sequence in self._encode(list(texts))]
            lengths.append(np.fromiter(map(len, ids), dtype=np.int32, count=len(ids)))
            tokens.append(b"".join(np.array(sequence, dtype=self._dtype).tobytes() for sequence in ids))
        text_bytes = sum(len(text.encode()) for texts in documents for text in texts)
        return EncodedBatch(tokens, lengths, text_bytes, rejected)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts) if texts else []


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    data: DataConfig,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    max_rejected: float = 0.001,
    overwrite: bool = False,
    log_interval: int = 10_000,
) -> Summary:
    """Tokenize JSON-lines files into one dataset for each key, ``OUTPUT_PREFIX_KEY_document``.

    Args:
        inputs: JSON-lines files, plain, .gz or .zst.
        output_prefix: path and beginning of the name of what is written.
        data: the tokenizer's flags.
        json_keys: fields of a line to take; each makes its own dataset.
        append_eod: whether an end-of-document token follows each document that is not empty.
        workers: tokenizing processes; 0 tokenizes in this one.
        max_rejected: largest share of broken lines that is tolerated. They are listed in OUTPUT_PREFIX.rejected.jsonl.
        overwrite: whether existing output may be replaced.
        log_interval: documents between two lines of progress where there is no terminal.

    Raises:
        DataError: inputs, flags, output or too many lines are wrong. Nothing then stands under the final names.
    """
    total_bytes = check_inputs(inputs)
    prefixes = [f"{output_prefix}_{key}_document" for key in json_keys]
    if len(set(json_keys)) < len(json_keys):
        raise DataError(f"--json-keys {' '.join(json_keys)}: a key is given more than once")
    if not overwrite:
        for prefix in prefixes:
            check_free(prefix)
    tokenizer = build_tokenizer(data)
    rejects = _Rejects(f"{output_prefix}.rejected.jsonl", max_rejected, total_bytes)
    with contextlib.ExitStack() as on_failure:
        writers = []
        for prefix in prefixes:
            writers.append(IndexedWriter(prefix, IndexedWriter.dtype_for(tokenizer.vocab_size), overwrite))
            on_failure.callback(writers[-1].discard)
        rejects.open()
        on_failure.callback(rejects.close)

        encoder = LineEncoder(tokenizer, json_keys, append_eod)
        with (
            _mapping(encoder, data, json_keys, append_eod, workers) as encode,
            Progress(total_bytes, log_interval) as bar,
        ):
            for batch, encoded in encode(read_batches(inputs)):
                for writer, tokens, lengths in zip(writers, encoded.tokens, encoded.lengths, strict=True):
                    writer.add(tokens, lengths)
                rejects.add(batch, encoded.rejected)
                bar.update(batch.consumed, len(encoded.lengths[0]), encoded.text_bytes, rejects.count)
        rejects.close()
        rejects.check()
        for key, writer in zip(json_keys, writers, strict=True):
            if writer.tokens == 0:
                raise DataError(f"--input: not one token under the key {key!r} in {len(inputs)} file(s)")
            writer.finish(_manifest(tokenizer, key, append_eod, writer, rejects.count, inputs))
        for writer in writers:
            writer.publish()
        on_failure.pop_all()
    return Summary(
        prefixes,
        writers[0].documents,
        sum(writer.tokens for writer in writers),
        rejects.count,
        rejects.path if rejects.count else None,
    )


def _manifest(
    tokenizer: Tokenizer, key: str, append_eod: bool, writer: IndexedWriter, rejected: int, inputs: Sequence[str]
) -> Manifest:
    return Manifest(
        tokenizer=describe_tokenizer(tokenizer),
        json_key=key,
        append_eod=append_eod,
        dtype=np.dtype(writer.dtype).name,
        documents=writer.documents,
        tokens=writer.tokens,
        rejected=rejected,
        inputs=[{"path": path, "bytes": os.path.getsize(path)} for path in inputs],
    )


class _Rejects:
    """Broken lines: written down, counted, and too many are an error."""

    def __init__(self, path: str, largest_share: float, total_bytes: int) -> None:
        if not 0 <= largest_share <= 1:
            raise DataError(f"--max-rejected {largest_share}: expected a share between 0 and 1, such as 0.001")
        self.path, self.count = path, 0
        self._share, self._total_bytes = largest_share, total_bytes
        self._lines = 0
        self._examples: list[str] = []

    def open(self) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        """Close the list; remove it where nothing was rejected."""
        self._file.close()
        if self.count == 0 and os.path.exists(self.path):
            os.remove(self.path)

    def add(self, batch: LineBatch, rejected: list[tuple[int, str, str]]) -> None:
        """Note a batch's broken lines. Raises DataError once the limit is sure to be broken.

        Sure means: twice as many as the limit allows in as many lines as all files will have, going by the bytes read.
        """
        self._lines += len(batch.lines)
        for number, reason, line in rejected:
            record = {"file": batch.path, "line": number, "reason": reason, "text": line}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.count += 1
            if len(self._examples) < _EXAMPLES:
                self._examples.append(f"{batch.path}, line {number}: {reason}")
        all_lines = self._lines * self._total_bytes / max(batch.consumed, 1)
        if self.count > 100 and self.count > 2 * self._share * all_lines:
            self._file.flush()
            self._fail(f"already {self.count} of the first {self._lines} lines are broken")

    def check(self) -> None:
        """Raise DataError where more lines are broken than allowed."""
        if self.count > self._share * self._lines:
            self._fail(f"{self.count} of {self._lines} lines are broken")

    def _fail(self, what: str) -> None:
        raise DataError(
            f"{what}, more than --max-rejected {self._share:g} allows. Nothing was published; they are listed in "
            f"{self.path}. The first:\n  "
            + "\n  ".join(self._examples)
            + '\nExpected one object a line, such as {"text": "..."}. Mend the input, name the right --json-keys, '
            "or raise --max-rejected to do without those lines"
        )


# ---------------------------------------------------------------------------------------------------- worker processes

_Results = Iterator[tuple[LineBatch, EncodedBatch]]
_process_encoder: LineEncoder | None = None  # of a worker process, made once by _start_worker


@contextlib.contextmanager
def _mapping(
    encoder: LineEncoder, data: DataConfig, keys: Sequence[str], append_eod: bool, workers: int
) -> Iterator[Callable[[Iterator[LineBatch]], _Results]]:
    """A function that encodes batches in order, here or in ``workers`` processes."""
    if workers < 0:
        raise DataError(f"--workers {workers}: expected 0 (tokenize in this process) or more")
    if workers == 0:
        yield lambda batches: ((batch, encoder(batch)) for batch in batches)
        return
    # Fresh processes: forking one in which libraries have started threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (data, tuple(keys), append_eod))
    try:
        yield lambda batches: _ordered(pool, batches, workers * _QUEUED_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died; most often the system ended it for lack of memory. Try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(pool: ProcessPoolExecutor, batches: Iterator[LineBatch], most: int) -> _Results:
    """Results in the order of ``batches``, with at most ``most`` under way so that memory stays flat."""
    waiting: collections.deque[tuple[LineBatch, Future[EncodedBatch]]] = collections.deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode, batch)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    for batch, future in waiting:
        yield batch, future.result()


def _start_worker(data: DataConfig, keys: Sequence[str], append_eod: bool) -> None:
    global _process_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    end_with_parent()
    _process_encoder = LineEncoder(build_tokenizer(data), keys, append_eod)


def _encode(batch: LineBatch) -> EncodedBatch:
    assert _process_encoder is not None  # set by _start_worker
    return _process_encoder(batch)
