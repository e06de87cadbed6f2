"""The command line of tools/inspect_dataset.py."""

import json

from test_docs import tool as load


def tool(name: str):
    return load(f"tools/{name}.py")


def test_counts_samples_json_and_check(folder, capsys):
    inspect_dataset = tool("inspect_dataset")
    flags = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"]
    words = ["a_text_document.idx", "b_text_document", "--verify", "--samples", "2", "--json", "counts.json", *flags]
    assert inspect_dataset.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("everything is as it was made") == 2
    assert shown.count("--- document") == 4
    assert [report["documents"] for report in json.loads((folder / "counts.json").read_text())] == [20, 20]


def test_damage_and_errors_give_status_1(folder, capsys):
    inspect_dataset = tool("inspect_dataset")
    content = bytearray((folder / "a_text_document.bin").read_bytes())
    content[0] ^= 1
    (folder / "a_text_document.bin").write_bytes(content)
    assert inspect_dataset.main(["a_text_document", "--verify"]) == 1
    assert "wrong: " in capsys.readouterr().out
    assert inspect_dataset.main(["c_text_document"]) == 1
    assert "there is no c_text_document.idx" in capsys.readouterr().err
    assert inspect_dataset.main(["a_text_document", "--samples", "1"]) == 1
    assert "--vocab-file" in capsys.readouterr().err
