"""Batches of records -> tokens, in this process or in workers.

What travels between processes are batches of raw records one way and arrays of tokens the other, never single
documents. Results come in the order of the batches, whatever the number of workers.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from megatron.config import DataConfig
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.jsonl import record_texts
from megatron.data.processes import end_with_parent
from megatron.data.reading import ROW, Batch
from megatron.data.tokenizer import Tokenizer, build_tokenizer

_QUEUED_PER_WORKER = 4


@dataclasses.dataclass
class EncodedBatch:
    """What became of one :class:`Batch`."""

    tokens: list[bytes]
    """Per key, the tokens of all documents one after another."""
    lengths: list[np.ndarray]
    """Per key, int32 tokens of each document."""
    text_bytes: int
    rejected: list[tuple[int, str, str]]
    """Number of the record in its span, reason and the record itself."""


class BatchEncoder:
    """Turns batches of records into tokens."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._keys = tokenizer, tuple(keys)
        self._dtype = IndexedWriter.dtype_for(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eod] if append_eod else [], dtype=self._dtype)

    def __call__(self, batch: Batch) -> EncodedBatch:
        rejected: list[tuple[int, str, str]] = []
        numbers: list[int] = []
        documents: list[list[str]] = []

        def reject(number: int, error: DataError) -> None:
            record = batch.records[number - batch.first]
            shown = repr(record) if batch.kind == ROW else record.decode("utf-8", "backslashreplace").rstrip("\r\n")
            rejected.append((number, str(error), shown))

        for number, record in enumerate(batch.records, start=batch.first):
            try:
                texts = record_texts(record, batch.kind, self._keys, number == 1 and batch.span.start == 0)
            except DataError as error:
                reject(number, error)
                continue
            if texts is not None:
                numbers.append(number)
                documents.append(texts)
        try:
            encoded = self._encode(documents)
        except DataError:  # of one text; find it
            good = []
            for number, texts in zip(numbers, documents, strict=True):
                try:
                    self._encode([texts])
                    good.append(texts)
                except DataError as error:
                    reject(number, error)
            documents, encoded = good, self._encode(good)
        tokens, lengths = zip(*(self._joined(arrays) for arrays in encoded), strict=True)
        text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for texts in documents for text in texts)
        return EncodedBatch(list(tokens), list(lengths), text_bytes, sorted(rejected))

    def _encode(self, documents: list[list[str]]) -> list[list[np.ndarray]]:
        columns = zip(*documents, strict=True) if documents else ((),) * len(self._keys)
        return [self._tokenizer.encode_arrays(list(texts)) if texts else [] for texts in columns]

    def _joined(self, arrays: list[np.ndarray]) -> tuple[bytes, np.ndarray]:
        """Tokens and lengths of documents; one that is not empty gets its end."""
        parts = [part for ids in arrays if len(ids) for part in (ids, self._end)]
        lengths = np.array([len(ids) + len(self._end) if len(ids) else 0 for ids in arrays], dtype=np.int32)
        return np.concatenate([self._end[:0], *parts], dtype=self._dtype, casting="unsafe").tobytes(), lengths


# ---------------------------------------------------------------------------------------------------- worker processes

_Results = Iterator[tuple[Batch, EncodedBatch]]
_process_encoder: BatchEncoder | None = None  # of a worker process, made once by _start_worker


@contextlib.contextmanager
def encoding(
    encoder: BatchEncoder, data: DataConfig, keys: Sequence[str], append_eod: bool, workers: int
) -> Iterator[Callable[[Iterator[Batch]], _Results]]:
    """A function that encodes batches in order, here (0 ``workers``) or in ``workers`` processes.

    Raises:
        DataError: the number is negative, or a worker died.
    """
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


def _ordered(pool: ProcessPoolExecutor, batches: Iterator[Batch], most: int) -> _Results:
    """Results in the order of ``batches``, with at most ``most`` under way so that memory stays flat."""
    waiting: collections.deque[tuple[Batch, Future[EncodedBatch]]] = collections.deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode, batch)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _start_worker(data: DataConfig, keys: Sequence[str], append_eod: bool) -> None:
    global _process_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    end_with_parent()
    _process_encoder = BatchEncoder(build_tokenizer(data), keys, append_eod)


def _encode(batch: Batch) -> EncodedBatch:
    assert _process_encoder is not None  # set by _start_worker
    return _process_encoder(batch)
