"""What tests of several command lines need."""

import corpus
import pytest

from megatron.data.preprocess import preprocess


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Datasets a and b, in the working folder."""
    data = corpus.gpt2(tmp_path)
    for name in ("a", "b"):
        path = corpus.write_jsonl(tmp_path / f"{name}.jsonl", corpus.english(20, seed=ord(name)))
        preprocess([str(path)], str(tmp_path / name), data, append_eod=True, workers=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path
