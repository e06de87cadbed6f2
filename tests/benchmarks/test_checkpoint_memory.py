"""Every conversion is run and watched."""

import json

import corpus
import pytest

from benchmarks import checkpoint_memory


@pytest.mark.exhaustive
@pytest.mark.parametrize("few", [True, False], ids=["two", "all"])
def test_conversions_are_measured(tmp_path, capsys, monkeypatch, few):
    if few:
        two = (("megatron-lm", "native"), ("native", "megatron-deepspeed"))
        monkeypatch.setattr(checkpoint_memory, "CONVERSIONS", two)
    data = corpus.gpt2(tmp_path)
    words = ["--layers", "2", "--hidden-size", "64", "--num-experts", "2", "--json", str(tmp_path / "out.json")]
    checkpoint_memory.main([*words, "--vocab-file", data.vocab_file, "--merge-file", data.merge_file])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == len(checkpoint_memory.CONVERSIONS)
    assert all(10e6 < row["private"] <= row["peak"] and row["layers"] == 2 for row in rows)
    assert "| native to megatron-deepspeed |" in capsys.readouterr().out
