"""The command line of tools/clean_corpus.py."""

import corpus
from test_docs import tool


def test_counts_by_reason_and_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    corpus.write_jsonl(tmp_path / "in.jsonl.gz", [*corpus.english(20), "short", "a" * 1000, corpus.english(20)[0]])
    clean_corpus = tool("tools/clean_corpus.py")
    words = ["--input", "in.jsonl.gz", "--output-prefix", "out", "--workers", "0", "--exact-duplicates"]
    words += ["--min-characters", "6", "--max-characters", "10K", "--max-compression", "10"]
    assert clean_corpus.main(words) == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert first == "20 of 23 documents stay: out-00000.jsonl.zst"
    assert {reason.strip() for reason in reasons} == {
        "1 removed, exact duplicate",
        "1 removed, too short",
        "1 removed, repetitive",
    }
    assert clean_corpus.main(words) == 0
    again = capsys.readouterr().out
    assert again.startswith("20 of 23 documents stay (there already, nothing to do): out-00000.jsonl.zst")
    assert len(again.splitlines()) == 4
    (tmp_path / "out-00000.jsonl.zst").write_bytes(b"something else")
    for changed in (words, [*words, "--max-characters", "9K"]):
        assert clean_corpus.main(changed) == 1
        assert "--overwrite" in capsys.readouterr().err
