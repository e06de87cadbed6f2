"""The texts that a tokenizer is trained on."""

import corpus
import pytest

from megatron.data.errors import DataError
from megatron.data.text_sample import sample_texts


def test_sample_is_uniform_of_the_size_asked_and_in_order(tmp_path):
    texts = [f"{number:05d}" for number in range(10_000)]
    path = corpus.write_jsonl(tmp_path / "in.jsonl", texts)
    sample = sample_texts([str(path)], "text", 10_000, seed=3)
    assert len(sample) == 2000
    assert sample == sorted(sample)
    assert 4700 < sum(map(int, sample)) / 2000 < 5300  # the mean of uniform ones has a standard deviation of 58
    assert sample_texts([str(path)], "text", 10**9, seed=3) == texts


def test_broken_and_empty_records_are_left_out(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{\n{"text": ""}\n{"text": "b"}')
    assert sample_texts([str(tmp_path)], "text", 100, seed=1) == ["a", "b"]
    with pytest.raises(DataError, match="no document has text under the key 'body'"):
        sample_texts([str(tmp_path)], "body", 100, seed=1)
