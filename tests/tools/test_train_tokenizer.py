"""The command line of tools/train_tokenizer.py, started as a user starts it."""

import subprocess
import sys

import corpus

from megatron.config import DataConfig
from megatron.data.tokenizer import build_tokenizer

TOOL = str(corpus.ROOT / "tools" / "train_tokenizer.py")


def start(folder, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True, cwd=folder, timeout=120)


def test_train(tmp_path):
    corpus.write_jsonl(tmp_path / "in.jsonl.gz", corpus.english(300))
    flags = ["--input", "in.jsonl.gz", "--output", "new/model", "--vocab-size", "500"]
    done = start(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("new/model.model: 500 pieces")
    assert done.stderr == ""  # SentencePiece's own log is silenced
    data = DataConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "new" / "model.model")
    )  # fmt: skip
    tokenizer = build_tokenizer(data)
    assert tokenizer.vocab_size == 500
    for text in corpus.NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    assert "--overwrite" in start(tmp_path, *flags).stderr
    again = start(tmp_path, *flags, "--overwrite", "--verbose")
    assert again.returncode == 0
    assert "trainer" in again.stderr
    assert build_tokenizer(data).fingerprint == tokenizer.fingerprint


def test_byte_level(tmp_path):
    corpus.write_jsonl(tmp_path / "in.jsonl", corpus.english(300))
    done = start(tmp_path, "--input", "in.jsonl", "--output", "own", "--vocab-size", "400", "--model-type", "byte-bpe")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("own-vocab.json and own-merges.txt: 400 tokens")
    assert done.stderr == ""
    files = (str(tmp_path / name) for name in ("own-vocab.json", "own-merges.txt"))
    data = DataConfig(**dict(zip(("vocab_file", "merge_file"), files, strict=True)))
    assert build_tokenizer(data).vocab_size == 400


def test_errors(tmp_path):
    corpus.write_jsonl(tmp_path / "in.jsonl", ["a few words"])
    done = start(tmp_path, "--input", "in.jsonl", "--output", "model", "--vocab-size", "5K")
    assert done.returncode == 1
    assert done.stderr.startswith("error: SentencePiece cannot train --vocab-size 5000 on this text")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
