"""What a dataset is known by."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data import identity
from megatron.data.identity import identify, identify_alone, vocabulary_problems
from megatron.data.index_file import write_index
from megatron.data.tokenizer import build_tokenizer


def make(prefix: Path, tokens: np.ndarray, documents: int = 4) -> str:
    lengths = np.full(documents, len(tokens) // documents, np.int32)
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, tokens.dtype, lengths, np.arange(1, documents + 1))
    tokens.tofile(f"{prefix}.bin")
    return str(prefix)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(5, 250, 40_000).astype(np.uint16)


def test_the_range_of_all_tokens(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(identity, "_CHUNK", 4096)
    tokens[33_333], tokens[7] = 60_000, 2
    found = identify_alone(make(tmp_path / "a", tokens))
    assert (found.lowest, found.highest) == (2, 60_000)


@pytest.mark.parametrize("place", [0, 20_001, 39_999])
def test_one_token_makes_another_corpus(place, tmp_path, tokens):
    first = identify([make(tmp_path / "a", tokens)], tmp_path)
    tokens[place] += 1
    assert identify([make(tmp_path / "a", tokens)], tmp_path) != first


def test_cuts_between_documents_make_another_corpus(tmp_path, tokens):
    assert identify_alone(make(tmp_path / "a", tokens)) != identify_alone(make(tmp_path / "a", tokens, documents=5))


def test_a_copy_is_the_same_wherever_it_lies(tmp_path, tokens):
    one, other = make(tmp_path / "a", tokens), make(tmp_path / "b", tokens)
    os.utime(f"{other}.bin", (1, 1))
    found = identify([one, other], tmp_path)
    assert found[one] == found[other]


def test_it_is_read_once(tmp_path, tokens, monkeypatch):
    prefix = make(tmp_path / "a", tokens)
    found = identify([prefix], tmp_path / "cache")
    read: list[str] = []
    monkeypatch.setattr(identity, "_read", lambda prefix, *_: read.append(prefix) or [("", 0, 0)])
    assert identify([prefix], tmp_path / "cache") == found
    assert not read
    os.utime(f"{prefix}.bin", (1, 1))
    identify([prefix], tmp_path / "cache")
    assert read == [prefix]


def test_what_is_remembered_may_be_damaged(tmp_path, tokens):
    prefix = make(tmp_path / "a", tokens)
    found = identify([prefix], tmp_path / "cache")
    (memory,) = (tmp_path / "cache").iterdir()
    for wrong in ("", "{}", "[1]", '{"content": 1'):
        memory.write_text(wrong)
        assert identify([prefix], tmp_path / "cache") == found


def test_tokens_outside_of_the_vocabulary(tmp_path, tokens):
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="ByteTokenizer"))  # 257 tokens, padded to 384
    prefix = make(tmp_path / "a", tokens)
    assert vocabulary_problems(prefix, identify_alone(prefix), tokenizer) == []
    tokens[-1] = 257
    prefix = make(tmp_path / "a", tokens)
    (problem,) = vocabulary_problems(prefix, identify_alone(prefix), tokenizer)
    assert "holds token 257, but the vocabulary of this run's ByteTokenizer ends at 256" in problem
    signed = tokens.astype(np.int32)
    signed[100], signed[-1] = -3, 1
    prefix = make(tmp_path / "a", signed)
    (problem,) = vocabulary_problems(prefix, identify_alone(prefix), tokenizer)
    assert "holds token -3" in problem
