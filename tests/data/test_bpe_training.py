"""A byte-level BPE of our own making is one of GPT-2's kind."""

import corpus
import pytest

from megatron.config import DataConfig
from megatron.data.bpe_training import train_bpe
from megatron.data.errors import DataError
from megatron.data.tokenizer import build_tokenizer


def train(folder, texts, vocab_size=500, **options) -> DataConfig:
    path = corpus.write_jsonl(folder / "in.jsonl.zst", texts)
    vocab, merges = train_bpe([str(path)], str(folder / "new" / "bpe"), vocab_size, **options)
    return DataConfig(vocab_file=vocab, merge_file=merges)


def test_every_text_comes_back_and_both_libraries_agree(tmp_path):
    tokenizer = build_tokenizer(train(tmp_path, corpus.english(300)))
    assert (tokenizer.vocab_size, tokenizer.eod) == (500, 499)
    texts = [*corpus.NASTY, *corpus.MARKERS, *corpus.english(20), *corpus.random_texts(100, seed=9)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_arrays([text])[0].tolist() == ids
    english = corpus.english(50)
    assert sum(map(len, tokenizer.encode_batch(english))) < 0.6 * sum(map(len, english))


def test_same_arguments_same_files(tmp_path):
    first = build_tokenizer(train(tmp_path, corpus.english(100))).fingerprint
    with pytest.raises(DataError, match="--overwrite"):
        train(tmp_path, corpus.english(100))
    assert build_tokenizer(train(tmp_path, corpus.english(100), overwrite=True)).fingerprint == first


@pytest.mark.parametrize(
    ("texts", "size", "words"),
    [
        (["a few words"], 5000, "this text gives no more than"),
        (["a"], 256, "--vocab-size 256"),
        ([""], 500, "no document"),
    ],
)
def test_errors_write_nothing(texts, size, words, tmp_path):
    with pytest.raises(DataError, match=words):
        train(tmp_path, texts, vocab_size=size)
    assert not (tmp_path / "new").exists()
