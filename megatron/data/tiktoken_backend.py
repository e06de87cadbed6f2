"""tiktoken (an extra): its own encodings, and a faster way to the tokens of a GPT-2 vocabulary.

tiktoken merges by the id of the merged token, a merges.txt by the number of its line. The two agree where ids follow
the lines, which :func:`from_gpt2_files` checks; GPT-2's own files, and those of every trainer of byte-level BPE, do.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megatron.data.errors import DataError

LONG = 200_000
"""Characters of a run of white space that tiktoken's regular expressions may not get through."""


def encoding_from_file(path: str) -> Any:
    """The ``tiktoken.Encoding`` named as its file, such as ``cl100k_base.tiktoken``; nothing is downloaded.

    Raises:
        DataError: tiktoken is not installed, it has no encoding of that name, or the file is broken.
    """
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
        from tiktoken_ext import openai_public
    except ImportError as error:
        raise DataError(
            '--tokenizer-type TiktokenTokenizer needs tiktoken; pip install "megatron-moe[data]"'
        ) from error
    name, known = Path(path).stem, openai_public.ENCODING_CONSTRUCTORS
    if name not in known:
        raise DataError(
            f"--tokenizer-model {path}: tiktoken has no encoding {name!r}; name the file after its encoding, one of "
            f"{', '.join(f'{name}.tiktoken' for name in known)}"
        )
    try:
        ranks = load_tiktoken_bpe(path)
        with mock.patch.object(openai_public, "load_tiktoken_bpe", return_value=ranks):
            arguments: Any = known[name]()
        return tiktoken.Encoding(**arguments | {"explicit_n_vocab": None})
    except (ValueError, AssertionError, IndexError) as error:
        raise DataError(f"--tokenizer-model {path} is no .tiktoken file of ranks: {error!r}") from error


def from_gpt2_files(vocab_file: str, merge_file: str) -> Any | None:
    """A ``tiktoken.Encoding`` with exactly the tokens of these files; None where there is none, or no tiktoken."""
    try:
        import tiktoken
        from tiktoken_ext import openai_public
    except ImportError:
        return None
    with open(vocab_file, encoding="utf-8") as file:
        vocab: dict[str, int] = json.load(file)
    with open(merge_file, encoding="utf-8") as file:
        merges = [
            tuple(line.split(" ")) for line in file.read().splitlines() if not line.startswith("#version") and line
        ]
    byte_of = _byte_of_character()
    special = {token: id for token, id in vocab.items() if token == "<|endoftext|>"}
    made = {left + right: number for number, (left, right) in enumerate(merges)}
    known = set(byte_of) | made.keys() | special.keys()
    if vocab.keys() != known or len(made) < len(merges) or len(set(vocab.values())) < len(vocab):
        return None
    ids = [vocab[token] for token in made]
    if ids != sorted(ids) or any(
        max(made.get(left, -1), made.get(right, -1)) >= made[left + right] for left, right in merges
    ):
        return None
    ranks = {bytes(map(byte_of.__getitem__, token)): id for token, id in vocab.items() if token not in special}
    return tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def encode(encoding: Any, text: str) -> np.ndarray:
    """Token ids of ``text``, uint32 [tokens]; no special token is recognised."""
    return encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())


def _byte_of_character() -> dict[str, int]:
    """The characters in which GPT-2's vocab.json writes bytes: printable ones as they are, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}
