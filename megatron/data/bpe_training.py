"""Training a byte-level BPE of GPT-2's kind on a sample of a corpus: every text round-trips exactly."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.files import check_prefix, check_writable, write_whole
from megatron.data.text_sample import sample_texts

_SMALLEST = 257
"""Tokens: the bytes and the end of a document."""


def train_bpe(
    inputs: Sequence[str],
    output_prefix: str,
    vocab_size: int,
    *,
    json_key: str = "text",
    sample_bytes: int = 10_000_000,
    seed: int = 1234,
    overwrite: bool = False,
) -> tuple[str, str]:
    """Train ``OUTPUT_PREFIX-vocab.json`` and ``OUTPUT_PREFIX-merges.txt``, the files of a ``GPT2BPETokenizer``.

    Args:
        inputs: files, glob patterns and folders; see :func:`megatron.data.inputs.find_inputs`.
        output_prefix: path and beginning of the names.
        vocab_size: number of tokens, the 256 bytes and ``<|endoftext|>`` among them.
        json_key: the field with the text.
        sample_bytes: train on a random choice of documents of about this size.
        seed: of that choice.
        overwrite: whether existing files may be replaced.

    Returns:
        The paths of both files.

    Raises:
        DataError: input, output or sizes are wrong. No file is written then.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    vocab_path, merge_path = Path(f"{output_prefix}-vocab.json"), Path(f"{output_prefix}-merges.txt")
    if vocab_size < _SMALLEST:
        raise DataError(f"--vocab-size {vocab_size}: expected {_SMALLEST} or more, the bytes and <|endoftext|>")
    check_prefix(output_prefix, "--output")
    check_writable(output_prefix)
    existing = [str(path) for path in (vocab_path, merge_path) if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{', '.join(existing)} exist already; give --overwrite or another --output")
    sample = sample_texts(inputs, json_key, sample_bytes, seed)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end of a document comes last, as GPT-2 has it
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(sample, trainer, length=len(sample))
    model = json.loads(backend.to_str())["model"]
    vocab, merges = model["vocab"], model["merges"]
    if len(vocab) < vocab_size - 1:
        raise DataError(
            f"--vocab-size {vocab_size}: this text gives no more than {len(vocab) + 1} tokens; ask for fewer, or give "
            "more text or --sample-bytes"
        )
    vocab["<|endoftext|>"] = len(vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    write_whole({
        vocab_path: json.dumps(vocab, ensure_ascii=False).encode(),
        merge_path: ("\n".join(lines) + "\n").encode(),
    })  # fmt: skip
    return str(vocab_path), str(merge_path)
