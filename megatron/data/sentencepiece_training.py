"""Training a SentencePiece model on a sample of a corpus.

The model keeps text as it is: no normalisation, no added or dropped spaces, and a byte piece for every byte, so that
decoding gives back what was encoded, line ends and runs of spaces included.
"""

import contextlib
import heapq
import io
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.inputs import find_inputs, spans_of
from megatron.data.jsonl import record_texts
from megatron.data.reading import read_batches

MODEL_TYPES = ("unigram", "bpe")
_LONGEST_LINE = 1000
"""Characters; at most four bytes each, and SentencePiece leaves out what is longer than 4192 bytes."""


def train(
    inputs: Sequence[str],
    output_prefix: str,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    json_key: str = "text",
    sample_bytes: int = 10_000_000,
    seed: int = 1234,
    threads: int = 2,
    overwrite: bool = False,
    verbose: bool = False,
) -> str:
    """Train ``OUTPUT_PREFIX.model``; the same arguments give the same file.

    Args:
        inputs: files, glob patterns and folders; see :func:`megatron.data.inputs.find_inputs`.
        output_prefix: path without ``.model``.
        vocab_size: number of pieces; 258 of them are bytes, ``<unk>`` and the end of document ``</s>``.
        model_type: one of ``MODEL_TYPES``.
        json_key: the field with the text.
        sample_bytes: train on a random choice of documents of about this size.
        seed: of that choice.
        threads: of SentencePiece. Part of the recipe: sums are made thread by thread.
        overwrite: whether an existing model may be replaced.
        verbose: show SentencePiece's own log.

    Returns:
        The model's path.

    Raises:
        DataError: input, output or sizes are wrong. No file is written then.
    """
    import sentencepiece

    paths = find_inputs(inputs)
    path = Path(f"{output_prefix}.model")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; give --overwrite or another --output")
    sample = _sample(paths, json_key, sample_bytes, seed)
    if not sample:
        raise DataError(f"--input: no document has text under the key {json_key!r}; name the right --json-key")
    model = io.BytesIO()
    with contextlib.nullcontext() if verbose else _silenced():
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in sample for line in _lines(text)),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                num_threads=threads,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                shuffle_input_sentence=False,
            )
        except (RuntimeError, OSError) as error:
            raise DataError(f"SentencePiece cannot train --vocab-size {vocab_size} on this text: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.incomplete")
    try:
        with open(unfinished, "wb") as file:
            file.write(model.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)


def _sample(inputs: Sequence[str], key: str, most_bytes: int, seed: int) -> list[str]:
    """A uniform choice of documents of ``most_bytes`` or somewhat less, read in one pass and in their order.

    Every document draws a random number; those with the smallest stay.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap whose top has the largest draw
    size = 0
    for number, text in enumerate(_texts(inputs, key)):
        heapq.heappush(kept, (-draw.random(), number, text))
        size += len(text.encode())
        while size > most_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _texts(inputs: Sequence[str], key: str) -> Iterator[str]:
    """Texts that are not empty; broken lines are left to tools/preprocess_data.py to report."""
    for batch in read_batches(spans_of(inputs), (key,)):
        for number, record in enumerate(batch.records, start=batch.first):
            with contextlib.suppress(DataError):
                texts = record_texts(record, batch.kind, (key,), first=number == 1)
                if texts and texts[0]:
                    yield texts[0]


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), _LONGEST_LINE):
            yield line[start : start + _LONGEST_LINE]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send what C++ code writes to standard error nowhere: SentencePiece logs there before it knows its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
