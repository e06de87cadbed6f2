"""Training a SentencePiece model on a sample of a corpus.

The model keeps text as it is: no normalisation, no added or dropped spaces, and a byte piece for every byte, so that
decoding gives back what was encoded, line ends and runs of spaces included.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.files import check_prefix, check_writable, write_whole
from megatron.data.text_sample import sample_texts

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

    for flag, value in (("--vocab-size", vocab_size), ("--threads", threads)):
        if value < 1:
            raise DataError(f"{flag} {value}: expected 1 or more")
    check_prefix(output_prefix, "--output")
    check_writable(output_prefix)
    path = Path(f"{output_prefix}.model")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; give --overwrite or another --output")
    sample = sample_texts(inputs, json_key, sample_bytes, seed)
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
    write_whole({path: model.getvalue()})
    return str(path)


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
