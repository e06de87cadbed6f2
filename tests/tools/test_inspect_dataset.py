"""The command line of tools/inspect_dataset.py."""

import json
import os
import subprocess
import sys

import corpus
from test_docs import tool as load

from megatron.data.preprocess import preprocess


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


def test_samples_in_any_language_on_any_terminal_and_a_reader_that_has_seen_enough(tmp_path):
    path = corpus.write_jsonl(tmp_path / "in.jsonl", ["日本語"] * 3000)
    preprocess([str(path)], str(tmp_path / "a"), corpus.byte_level(tmp_path), workers=0)
    command = [sys.executable, f"{corpus.ROOT}/tools/inspect_dataset.py", f"{tmp_path}/a_text_document"]
    command += ["--tokenizer-type", "ByteTokenizer", "--samples", "3000"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    with subprocess.Popen(command, **pipe) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    done = subprocess.run([*command[:-1], "1"], **pipe, check=True)
    assert done.stdout.endswith(rb"\u65e5\u672c\u8a9e" + b"\n")


def test_damage_and_errors_give_status_1(folder, capsys):
    inspect_dataset = tool("inspect_dataset")
    assert inspect_dataset.main(["a_text_document", "--samples", "-1"]) == 1
    assert "--samples -1: expected 0 or more" in capsys.readouterr().err
    content = bytearray((folder / "a_text_document.bin").read_bytes())
    content[0] ^= 1
    (folder / "a_text_document.bin").write_bytes(content)
    assert inspect_dataset.main(["a_text_document", "--verify"]) == 1
    assert "wrong: " in capsys.readouterr().out
    assert inspect_dataset.main(["c_text_document"]) == 1
    assert "there is no c_text_document.idx" in capsys.readouterr().err
    assert inspect_dataset.main(["a_text_document", "--samples", "1"]) == 1
    assert "--vocab-file" in capsys.readouterr().err
