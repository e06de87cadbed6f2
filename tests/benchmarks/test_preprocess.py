"""The benchmark of preprocess_data, on a few documents."""

import json

import numpy as np
import pytest
from corpus import NASTY, english, gpt2, write_jsonl

from benchmarks import preprocess
from megatron.data.preprocess import preprocess as tokenize


@pytest.mark.slow
def test_it_checks_measures_and_writes(tmp_path, capsys, monkeypatch):
    took = iter([(1.0, 1.0), (3.0, 2.0)])  # start-up, then all
    run_tool = preprocess.run_tool

    def timed(command, *arguments):
        found, prefix = run_tool(command, *arguments)
        assert found.wall > 0 < found.cpu
        return preprocess.Times(*next(took)), prefix

    monkeypatch.setattr(preprocess, "run_tool", timed)
    data = gpt2(tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl.zst", [*english(20), *NASTY])
    checkout = tmp_path / "megatron-lm" / "tools"
    checkout.mkdir(parents=True)
    (checkout / "preprocess_data.py").write_text("raise SystemExit('nothing to see')")
    words = ["--text", str(text), "--vocab-file", data.vocab_file, "--merge-file", data.merge_file, "--cores", "1"]
    words += ["--repeats", "1", "--megatron-lm", str(checkout.parent), "--json", str(tmp_path / "out.json")]
    preprocess.main(words)
    out = json.loads((tmp_path / "out.json").read_text())
    library, *_, ours = out["rows"]
    assert (library["tool"], library["of_tokenizers"], ours["tool"]) == ("tokenizers", 1, "ours")
    assert out["documents"] == 20 + sum(text != "" for text in NASTY)
    assert (ours["seconds"], ours["startup_seconds"], ours["cpu_seconds"]) == (3, 1, 1)
    assert (ours["tokens_per_second"], ours["tokens_per_cpu_second"]) == (out["tokens"] / 2, out["tokens"])
    assert ours["of_tokenizers"] == pytest.approx(library["seconds"] / 2)
    assert ours["of_megatron"] is None
    shown = capsys.readouterr().out
    assert "Megatron-LM on 1 cores is left out: RuntimeError: nothing to see\n" in shown
    assert "| ours | 1 |" in shown


def test_a_text_that_is_too_short_is_said():
    with pytest.raises(ValueError, match=r"1\.0 s, of which start-up 2\.0 s: take a longer text"):
        preprocess.make_row("ours", 1, 10, [preprocess.Times(1.0, 1.0)], [preprocess.Times(2.0, 0.5)])


def test_other_tokens_or_documents_are_not_timed(tmp_path):
    data, texts = gpt2(tmp_path), english(5)
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    tokenize([str(file)], str(tmp_path / "out"), data, append_eod=True, workers=0)
    arguments = preprocess.parse_args(
        ["--text", str(file), "--vocab-file", data.vocab_file, "--merge-file", data.merge_file]
    )
    preprocess.run_library(arguments, "tokenizers", file, tmp_path / "library.npz", 1)
    found = np.load(tmp_path / "library.npz")
    prefix, tokens, lengths = tmp_path / "out_text_document", found["tokens"], found["lengths"]
    assert len(lengths) == 5
    preprocess.check(prefix, tokens, lengths)
    with pytest.raises(AssertionError, match="other tokens"):
        preprocess.check(prefix, np.where(np.arange(len(tokens)) == 7, tokens + 1, tokens), lengths)
    with pytest.raises(AssertionError, match="other documents"):
        preprocess.check(prefix, tokens, lengths[[1, 0, 2, 3, 4]])


def test_the_first_documents_are_taken_and_empty_ones_are_not(tmp_path):
    file = write_jsonl(tmp_path / "text.jsonl.gz", ["one", "", "two", "three"])
    assert preprocess.take(str(file), 2, tmp_path / "out.jsonl") == 2
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()] == ["one", "two"]
    with pytest.raises(ValueError, match="found no document"):
        preprocess.take(str(write_jsonl(tmp_path / "empty.jsonl", [""])), None, tmp_path / "out.jsonl")
