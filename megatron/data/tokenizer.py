"""Tokenizers behind one small protocol.

Text is text: a document that happens to contain ``<|endoftext|>`` or ``</s>`` is encoded letter by letter, never as the
special token of that name. Only the tools put end-of-document tokens where documents end.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.config import DataConfig
from megatron.config.data import TOKENIZERS
from megatron.data import tiktoken_backend
from megatron.data.errors import DataError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(Protocol):
    """What the code base knows of a tokenizer."""

    kind: str
    """Its name in ``--tokenizer-type``."""
    vocab_size: int
    """Highest token id + 1, before any padding of the embedding."""
    eod: int
    """Id of the end-of-document token."""
    fingerprint: str
    """SHA-256 over its kind and the content of its files; equal fingerprints mean equal tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added or recognised."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, faster."""
        ...

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The same as arrays of any integer type, faster still where the library has no need of lists."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Raises ValueError where an id is outside of ``[0, vocab_size)``."""
        ...


class _FromLists:
    """Arrays by way of lists."""

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]  # type: ignore[attr-defined]


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE: every text round-trips exactly.

    Hugging Face's tokenizers make the tokens; where tiktoken is installed, it makes the same ones faster.

    Args:
        vocab_file: ``vocab.json``, token -> id.
        merge_file: ``merges.txt``, one merge a line, best first.

    Raises:
        DataError: a file is missing or broken, or the vocabulary lacks a byte or ``<|endoftext|>``.
    """

    kind = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        self.fingerprint = _fingerprint(self.kind, vocab_file, merge_file)
        try:
            self._backend = Backend(models.BPE.from_file(vocab_file, merge_file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"--vocab-file {vocab_file} with --merge-file {merge_file} is no GPT-2 vocabulary: {error}. "
                "Expected vocab.json (token -> id) and merges.txt (one merge a line) of one and the same tokenizer"
            ) from error
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = decoders.ByteLevel()
        vocab = self._backend.get_vocab()
        if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()):
            raise DataError(
                f"--vocab-file {vocab_file} lacks {len(missing)} of the 256 byte tokens, such as {missing[0]!r}: "
                "text with those bytes would be lost. Use a byte-level vocabulary such as GPT-2's"
            )
        self.vocab_size = max(vocab.values()) + 1
        self.eod = _end_of_document(vocab, ("<|endoftext|>",), f"--vocab-file {vocab_file}")
        self._files = (vocab_file, merge_file)

    @functools.cached_property
    def _fast(self) -> Any | None:
        return tiktoken_backend.from_gpt2_files(*self._files)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is None:
            return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]
        return [
            np.array(self.encode(text), dtype=np.int32)
            if _spaced_out(text)
            else tiktoken_backend.encode(self._fast, text)
            for text in texts
        ]

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


class HFTokenizer(_FromLists):
    """A Hugging Face ``tokenizer.json``, without the special tokens, truncation and padding it may ask for.

    Args:
        tokenizer_file: the ``tokenizer.json``.

    Raises:
        DataError: the file is missing or broken, or has none of the tokens in ``END_OF_DOCUMENT``.
    """

    kind = "HFTokenizer"

    def __init__(self, tokenizer_file: str) -> None:
        from tokenizers import Tokenizer as Backend

        self.fingerprint = _fingerprint(self.kind, tokenizer_file)
        try:
            self._backend = Backend.from_file(tokenizer_file)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"--tokenizer-model {tokenizer_file} is no Hugging Face tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # the library's name for: special tokens in text are text
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eod = _end_of_document(vocab, END_OF_DOCUMENT, f"--tokenizer-model {tokenizer_file}")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


class SentencePieceTokenizer(_FromLists):
    """A SentencePiece ``.model``.

    Models of ``tools/train_tokenizer.py`` round-trip every text, but for U+2581 (``▁``), which is how SentencePiece
    writes a space.

    Args:
        model_file: the ``.model``.

    Raises:
        DataError: the file is missing or broken, or has neither an end-of-sentence piece nor any of
            ``END_OF_DOCUMENT``.
    """

    kind = "SentencePieceTokenizer"

    def __init__(self, model_file: str) -> None:
        import sentencepiece

        self.fingerprint = _fingerprint(self.kind, model_file)
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=Path(model_file).read_bytes())
        except RuntimeError as error:
            raise DataError(f"--tokenizer-model {model_file} is no SentencePiece model: {error}") from error
        self.vocab_size = self._backend.vocab_size()
        self.eod = self._backend.eos_id()
        if self.eod < 0:
            ids = {name: self._backend.piece_to_id(name) for name in END_OF_DOCUMENT}
            pieces = {name: id for name, id in ids.items() if self._backend.id_to_piece(id) == name}
            self.eod = _end_of_document(pieces, END_OF_DOCUMENT, f"--tokenizer-model {model_file}")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, out_type=int)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._backend.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(_checked(ids, self.vocab_size))


class TiktokenTokenizer:
    """One of tiktoken's encodings, such as cl100k_base: every text round-trips exactly.

    Args:
        ranks_file: its file, under its name: ``cl100k_base.tiktoken``.

    Raises:
        DataError: the file is missing or broken, or its name is no encoding's.
    """

    kind = "TiktokenTokenizer"

    def __init__(self, ranks_file: str) -> None:
        self._backend = tiktoken_backend.encoding_from_file(ranks_file)
        self.fingerprint = _fingerprint(f"{self.kind} {self._backend.name}", ranks_file)
        self.vocab_size, self.eod = self._backend.n_vocab, self._backend.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        for text in texts:
            if _spaced_out(text):
                raise DataError(f"tiktoken cannot encode a run of more than {tiktoken_backend.LONG} white spaces")
        return [tiktoken_backend.encode(self._backend, text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(_checked(ids, self.vocab_size))


class ByteTokenizer:
    """The bytes of the text in UTF-8 as ids 0 to 255, and 256 as the end of a document; needs no file."""

    kind = "ByteTokenizer"
    vocab_size, eod = 257, 256
    fingerprint = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, the end of a document ``<|endoftext|>``."""
        parts = (bytes([id]) if id < self.eod else b"<|endoftext|>" for id in _checked(ids, self.vocab_size))
        return b"".join(parts).decode("utf-8", "replace")


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that ``data`` describes.

    Raises:
        DataError: a file it needs is not given, missing or broken.
    """

    def file(field: str) -> str:
        path, flag = getattr(data, field), "--" + field.replace("_", "-")
        if path is None:
            raise DataError(f"--tokenizer-type {data.tokenizer_type} needs {flag} FILE")
        if not Path(path).is_file():
            raise DataError(f"{flag} {path}: there is no such file")
        return path

    kind = data.tokenizer_type
    if kind == GPT2BPETokenizer.kind:
        return GPT2BPETokenizer(file("vocab_file"), file("merge_file"))
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    for made in (SentencePieceTokenizer, HFTokenizer, TiktokenTokenizer):
        if kind == made.kind:
            return made(file("tokenizer_model"))
    raise DataError(f"--tokenizer-type {kind!r} is not known; choose one of {', '.join(TOKENIZERS)}")


_SPACES = re.compile(rf"\s{{{tiktoken_backend.LONG}}}")


def _spaced_out(text: str) -> bool:
    return len(text) > tiktoken_backend.LONG and _SPACES.search(text) is not None


def _fingerprint(kind: str, *files: str) -> str:
    digest = hashlib.sha256(kind.encode())
    for file in files:
        content = Path(file).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _end_of_document(vocab: dict[str, int], names: Sequence[str], where: str) -> int:
    for name in names:
        if name in vocab:
            return vocab[name]
    raise DataError(
        f"{where} has no end-of-document token: looked for {', '.join(names)}. Add one of them to the tokenizer"
    )


def _checked(ids: Sequence[Any], vocab_size: int) -> list[int]:
    numbers = [int(id) for id in ids]
    if numbers and not (min(numbers) >= 0 and max(numbers) < vocab_size):
        wrong = next(id for id in numbers if not 0 <= id < vocab_size)
        raise DataError(
            f"token id {wrong} is outside of the vocabulary, which ends at {vocab_size - 1}; "
            "ids of the embedding's padding rows must not be sampled"
        )
    return numbers
