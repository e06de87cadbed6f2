"""The command line of tools/preprocess_data.py, started as a user starts it."""

import subprocess
import sys

import corpus

from megatron.data import manifest

TOOL = str(corpus.ROOT / "tools" / "preprocess_data.py")


def start(folder, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True, cwd=folder, timeout=120)


def test_from_jsonl_to_a_dataset(tmp_path):
    corpus.write_jsonl(tmp_path / "in.jsonl.zst", corpus.english(1000))
    corpus.gpt2(tmp_path)
    flags = ["--input", "in.jsonl.zst", "--output-prefix", "new/out", "--vocab-file", "vocab.json", "--append-eod"]
    flags += ["--merge-file", "merges.txt", "--workers", "2", "--log-interval", "100"]
    done = start(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "1,000 documents" in done.stdout
    assert "new/out_text_document" in done.stdout
    assert "docs/s" in done.stderr
    assert "MB/s" in done.stderr
    assert "arn" not in done.stderr  # no warnings
    assert manifest.read(str(tmp_path / "new" / "out_text_document")).documents == 1000

    again = start(tmp_path, *flags)
    assert again.returncode == 0, again.stderr
    assert "there already, nothing to do" in again.stdout
    corpus.write_jsonl(tmp_path / "in.jsonl.zst", corpus.english(1001))
    again = start(tmp_path, *flags)
    assert again.returncode == 1
    assert again.stderr.startswith("error: new/out_text_document.bin")
    assert "--overwrite" in again.stderr


def test_too_many_broken_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    corpus.gpt2(tmp_path)
    flags = [
        "--input",
        "in.jsonl",
        "--output-prefix",
        "out",
        "--vocab-file",
        "vocab.json",
        "--merge-file",
        "merges.txt",
    ]
    flags += ["--workers", "0"]
    done = start(tmp_path, *flags)
    assert done.returncode == 1
    assert "in.jsonl, line 2: no key 'text'; its keys: 'txt'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out_*"))
    done = start(tmp_path, *flags, "--max-rejected", "0.5")
    assert done.returncode == 0
    assert "1 broken lines were left out, see out.rejected.jsonl" in done.stdout


def test_wrong_flags_are_told_at_once(tmp_path):
    done = start(tmp_path, "--input", "none.jsonl", "--output-prefix", "out", "--tokenizer-type", "HFTokenizer")
    assert (done.returncode, done.stderr) == (1, "error: --input: none.jsonl: there is no such file\n")
    assert start(tmp_path, "--output-prefix", "out").returncode == 2
    assert start(tmp_path, "--help").returncode == 0
