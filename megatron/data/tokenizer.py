"""Tokenizers behind one small protocol.

Text is text: a document that happens to contain ``<|endoftext|>`` or ``</s>`` is encoded letter by letter, never as the
special token of that name. Only the tools put end-of-document tokens where documents end. (Prompts of a model that came
from Hugging Face are another matter: there, special tokens are recognised as its own tokenizer does it.)
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.config import DataConfig
from megatron.config.data import TOKENIZERS
from megatron.data import tiktoken_backend
from megatron.data.errors import DataError

GPT2_VOCAB_SIZE = 50257
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
    """SHA-256 over its kind, the content of its files and an end-of-document token that was named; equal fingerprints
    mean equal tokens of a corpus."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added."""
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


class _TokenizersBackend(_FromLists):
    """Encoding and decoding by Hugging Face's tokenizers."""

    _backend: Any
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


class GPT2BPETokenizer(_TokenizersBackend):
    """GPT-2's byte-level BPE: every text round-trips exactly.

    Hugging Face's tokenizers make the tokens; where tiktoken is installed, it makes the same ones faster.

    Args:
        vocab_file: ``vocab.json``, token -> id.
        merge_file: ``merges.txt``, one merge a line, best first.
        eod_token: the token that ends a document; ``<|endoftext|>`` by default.
        split_special_tokens: whether that token's name in a text is text.

    Raises:
        DataError: a file is missing or broken, or the vocabulary lacks a byte or the end-of-document token.
    """

    kind = "GPT2BPETokenizer"

    def __init__(
        self, vocab_file: str, merge_file: str, eod_token: str | None = None, split_special_tokens: bool = True
    ) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

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
        self.eod, other = _end_of_document(vocab, ("<|endoftext|>",), f"--vocab-file {vocab_file}", eod_token)
        self.fingerprint = _fingerprint(self.kind, vocab_file, merge_file, **other)
        self._files = (vocab_file, merge_file) if split_special_tokens else None
        if not split_special_tokens:
            self._backend.add_special_tokens([self._backend.id_to_token(self.eod)])

    @functools.cached_property
    def _fast(self) -> Any | None:
        return tiktoken_backend.from_gpt2_files(*self._files) if self._files else None

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is None:
            return super().encode_arrays(texts)
        return [
            np.array(self.encode(text), dtype=np.int32)
            if _spaced_out(text)
            else tiktoken_backend.encode(self._fast, text)
            for text in texts
        ]


class HFTokenizer(_TokenizersBackend):
    """A Hugging Face ``tokenizer.json``, without truncation, padding and the special tokens it may add around a text.

    Args:
        tokenizer_file: the ``tokenizer.json``.
        eod_token: the token that ends a document; by default the first of ``END_OF_DOCUMENT`` that there is.
        split_special_tokens: whether a special token's name in a text is text. (Added tokens that are not special are
            always recognised; the file says which are.)

    Raises:
        DataError: the file is missing or broken, or has no end-of-document token.
    """

    kind = "HFTokenizer"

    def __init__(self, tokenizer_file: str, eod_token: str | None = None, split_special_tokens: bool = True) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(tokenizer_file)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"--tokenizer-model {tokenizer_file} is no Hugging Face tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = split_special_tokens  # the library's name for it
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eod, other = _end_of_document(vocab, END_OF_DOCUMENT, f"--tokenizer-model {tokenizer_file}", eod_token)
        self.fingerprint = _fingerprint(self.kind, tokenizer_file, **other)


class SentencePieceTokenizer(_FromLists):
    """A SentencePiece ``.model``.

    Models of ``tools/train_tokenizer.py`` round-trip every text, but for U+2581 (``▁``), which is how SentencePiece
    writes a space.

    Args:
        model_file: the ``.model``.
        eod_token: the piece that ends a document; by default the end-of-sentence piece, or the first of
            ``END_OF_DOCUMENT`` that there is.

    Raises:
        DataError: the file is missing or broken, or has no end-of-document piece.
    """

    kind = "SentencePieceTokenizer"

    def __init__(self, model_file: str, eod_token: str | None = None) -> None:
        import sentencepiece

        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=Path(model_file).read_bytes())
        except RuntimeError as error:
            raise DataError(f"--tokenizer-model {model_file} is no SentencePiece model: {error}") from error
        self.vocab_size = self._backend.vocab_size()
        own = self._backend.eos_id()
        names = END_OF_DOCUMENT if own < 0 else (self._backend.id_to_piece(own),)
        ids = {name: self._backend.piece_to_id(name) for name in (*names, eod_token or names[0])}
        pieces = {name: id for name, id in ids.items() if self._backend.id_to_piece(id) == name}
        self.eod, other = _end_of_document(pieces, names, f"--tokenizer-model {model_file}", eod_token)
        self.fingerprint = _fingerprint(self.kind, model_file, **other)

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


def build_tokenizer(data: DataConfig, *, split_special_tokens: bool = True) -> Tokenizer:
    """The tokenizer that ``data`` describes.

    Args:
        data: kind, files, and the token that ends a document.
        split_special_tokens: False for one that recognises the names of special tokens in a text, if it is of GPT-2's
            files or a tokenizer.json.

    Raises:
        DataError: a file it needs is not given, missing or broken, or ``eod_token`` has no meaning for it.
    """
    if problems := tokenizer_problems(data):
        raise DataError("\n".join(problems))
    kind, model_file, eod_token = data.tokenizer_type, str(data.tokenizer_model), data.eod_token
    if kind == GPT2BPETokenizer.kind:
        return GPT2BPETokenizer(str(data.vocab_file), str(data.merge_file), eod_token, split_special_tokens)
    if kind == HFTokenizer.kind:
        return HFTokenizer(model_file, eod_token, split_special_tokens)
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(model_file, eod_token)
    if kind == TiktokenTokenizer.kind:
        return TiktokenTokenizer(model_file)
    return ByteTokenizer()


def tokenizer_problems(data: DataConfig) -> list[str]:
    """What keeps a tokenizer from being made of the options of ``data``, without opening a file."""
    problems = option_problems(data)
    for name in _files_of(data.tokenizer_type):
        file = getattr(data, name)
        if file is not None and not Path(file).is_file():
            problems.append(f"--{name.replace('_', '-')} {file}: no such file; give the tokenizer's own")
    return problems


def option_problems(data: DataConfig) -> list[str]:
    """What is wrong with the options of the tokenizer by themselves."""
    kind, problems = data.tokenizer_type, []
    if kind not in TOKENIZERS:
        return [f"--tokenizer-type {kind!r} is not known; choose one of {', '.join(TOKENIZERS)}"]
    if data.eod_token is not None and kind in (ByteTokenizer.kind, TiktokenTokenizer.kind):
        problems.append(
            f"--eod-token has no meaning for --tokenizer-type {kind}, whose end of a document is fixed; drop it"
        )
    for flag in (f"--{name.replace('_', '-')}" for name in _files_of(kind) if getattr(data, name) is None):
        problems.append(
            f"--tokenizer-type {kind} needs {flag}, which is missing; add {flag} FILE or take another tokenizer"
        )
    return problems


def _files_of(kind: str) -> tuple[str, ...]:
    """The options that name the files of a kind of tokenizer."""
    if kind == ByteTokenizer.kind:
        return ()
    return ("vocab_file", "merge_file") if kind == GPT2BPETokenizer.kind else ("tokenizer_model",)


def planned_vocab_size(data: DataConfig) -> int:
    """Vocabulary of a run that is planned, perhaps without the tokenizer's files: GPT-2's where it is not known."""
    return ByteTokenizer.vocab_size if data.tokenizer_type == ByteTokenizer.kind else GPT2_VOCAB_SIZE


_SPACES = re.compile(rf"\s{{{tiktoken_backend.LONG}}}")


def _spaced_out(text: str) -> bool:
    return len(text) > tiktoken_backend.LONG and _SPACES.search(text) is not None


def _fingerprint(kind: str, *files: str, **options: str) -> str:
    """``options`` are those that are not at their default."""
    digest = hashlib.sha256(kind.encode())
    for file in files:
        content = Path(file).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    if options:
        digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


def _end_of_document(
    vocab: dict[str, int], names: Sequence[str], where: str, wanted: str | None
) -> tuple[int, dict[str, str]]:
    """Its id; and, for the fingerprint, the name that was wanted if that is not the default's."""
    default = next((name for name in names if name in vocab), None)
    if wanted is not None and wanted not in vocab:
        raise DataError(f"--eod-token {wanted} is no token of {where}; give one of its vocabulary")
    if wanted is not None and wanted != default:
        return vocab[wanted], {"eod_token": wanted}
    if default is None:
        raise DataError(
            f"{where} has no end-of-document token: looked for {', '.join(names)}. Name its own by --eod-token, or add "
            "one of them to the tokenizer"
        )
    return vocab[default], {}


def _checked(ids: Sequence[Any], vocab_size: int) -> list[int]:
    numbers = [int(id) for id in ids]
    if numbers and not (min(numbers) >= 0 and max(numbers) < vocab_size):
        wrong = next(id for id in numbers if not 0 <= id < vocab_size)
        raise DataError(
            f"token id {wrong} is outside of the vocabulary, which ends at {vocab_size - 1}; "
            "ids of the embedding's padding rows must not be sampled"
        )
    return numbers
