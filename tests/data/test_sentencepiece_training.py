"""The sample that a tokenizer is trained on, and what the trained model keeps."""

import os

import corpus
import pytest

from megatron.config import DataConfig
from megatron.data import sentencepiece_training
from megatron.data.errors import DataError
from megatron.data.tokenizer import build_tokenizer


def train(folder, texts, vocab_size=400, **options):
    path = corpus.write_jsonl(folder / "in.jsonl", texts)
    options = {"threads": 1} | options
    return sentencepiece_training.train([str(path)], str(folder / "model"), vocab_size, **options)


def test_same_arguments_same_model(tmp_path):
    texts = corpus.english(300)
    models = []
    for _ in range(2):
        with open(train(tmp_path, texts, sample_bytes=50_000, overwrite=True), "rb") as file:
            models.append(file.read())
    assert models[0] == models[1]
    with open(train(tmp_path, texts, sample_bytes=50_000, overwrite=True, seed=7), "rb") as file:
        assert file.read() != models[0]


@pytest.mark.parametrize("model_type", sentencepiece_training.MODEL_TYPES)
def test_the_model_compresses_and_keeps_line_ends_and_spaces(model_type, tmp_path):
    texts = [f"{text}\n\n\tindented  twice {number}\r\n" for number, text in enumerate(corpus.english(300))]
    path = train(tmp_path, texts, model_type=model_type)
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path))
    assert tokenizer.vocab_size == 400
    tokens = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in tokens] == texts
    assert sum(map(len, tokens)) < 0.75 * sum(map(len, texts))


def test_long_lines_are_cut_not_left_out():
    text = "é" * 2500 + "\n" + "b"
    lines = list(sentencepiece_training._lines(text))
    assert "".join(lines) == text.replace("\n", "")
    assert max(len(line.encode()) for line in lines) <= 4192


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["abc"], {"vocab_size": 100_000}, "--vocab-size 100000"),
        (["abc"] * 50, {"vocab_size": 10}, "--vocab-size 10"),
        ([""], {}, "no document has text under the key 'text'"),
        (["abc"], {"json_key": "body"}, "no document has text under the key 'body'"),
        (["abc"], {"vocab_size": 0}, "--vocab-size 0: expected 1 or more"),
        (["abc"], {"threads": 0}, "--threads 0: expected 1 or more"),
        (["abc"], {"sample_bytes": -5}, "--sample-bytes -5: expected 1 or more"),
    ],
)
def test_errors_write_nothing(texts, options, words, tmp_path):
    with pytest.raises(DataError, match=words):
        train(tmp_path, texts, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(DataError, match="no permission to write to"):
        train(tmp_path, corpus.english(3))
    monkeypatch.undo()
    with pytest.raises(DataError, match="expected a folder and the beginning of a name"):
        sentencepiece_training.train([str(tmp_path / "in.jsonl")], f"{tmp_path}/", 400)


def test_an_existing_model_is_kept(tmp_path):
    (tmp_path / "model.model").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        train(tmp_path, corpus.english(300))
    assert (tmp_path / "model.model").read_text() == "mine"
