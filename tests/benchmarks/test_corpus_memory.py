"""Every tool is run and watched."""

import json

import corpus
import pytest

from benchmarks import corpus_memory


@pytest.mark.exhaustive
def test_all_tools_are_measured(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    pytest.importorskip("rensa")
    data = corpus.gpt2(tmp_path)
    text = corpus.write_jsonl(tmp_path / "text.jsonl", corpus.english(300))
    words = ["--text", str(text), "--megabytes", "1", "--workers", "1", "--json", str(tmp_path / "out.json")]
    corpus_memory.main([*words, "--vocab-file", data.vocab_file, "--merge-file", data.merge_file])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["tool"] for row in rows] == list(corpus_memory.TOOLS)
    for row in rows:
        assert 10e6 < row["private"] <= row["main"] <= row["all"]
        assert (row["worker"] > 0) == (row["tool"] != "merge")
    assert rows[-1]["documents"] == 1
    assert "| clean near |" in capsys.readouterr().out
