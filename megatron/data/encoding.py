"""Batches of records -> tokens. Runs in worker processes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron.config import DataConfig
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.jsonl import record_texts
from megatron.data.reading import ROW, Batch
from megatron.data.tokenizer import Tokenizer, build_tokenizer


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


def make_encoder(data: DataConfig, keys: Sequence[str], append_eod: bool) -> BatchEncoder:
    """An encoder with the tokenizer that ``data`` describes, for :func:`megatron.data.processes.in_order`."""
    return BatchEncoder(build_tokenizer(data), keys, append_eod)
