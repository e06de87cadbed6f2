"""Byte for byte the files of Megatron-LM's own tools/preprocess_data.py, from the same text and tokenizer.

Runs where $MEGATRON_LM names a checkout of Megatron-LM whose requirements are installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import corpus
import pytest

from benchmarks.preprocess import tokenizer_folder
from megatron.config import DataConfig
from megatron.data.preprocess import preprocess


@pytest.fixture
def checkout() -> Path:
    given = os.environ.get("MEGATRON_LM")
    if not given:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    return Path(given)


def theirs(checkout: Path, folder: Path, *flags: str) -> None:
    """Run their tool on folder/in.jsonl; writes folder/theirs_text_document."""
    tool = [sys.executable, str(checkout / "tools" / "preprocess_data.py"), "--input", str(folder / "in.jsonl")]
    tool += ["--output-prefix", str(folder / "theirs"), "--workers", "1", *flags]
    # what PYTHONPATH adds may be needed; this project's megatron must not hide theirs
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != corpus.ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), *paths]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(tool, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare(folder: Path, data: DataConfig, texts: list[str], append_eod: bool) -> None:
    preprocess([str(folder / "in.jsonl")], str(folder / "ours"), data, append_eod=append_eod, workers=0)
    for suffix in (".bin", ".idx"):
        expected = (folder / f"theirs_text_document{suffix}").read_bytes()
        assert (folder / f"ours_text_document{suffix}").read_bytes() == expected
    assert len(expected) > 12 * len(texts)


@pytest.mark.parametrize("append_eod", [True, False])
def test_gpt2(append_eod, checkout, tmp_path):
    data = corpus.gpt2(tmp_path)
    if folder := corpus.shared_data():
        names = (str(folder / "tokenizer" / f"gpt2-{name}") for name in ("vocab.json", "merges.txt"))
        data = DataConfig(**dict(zip(("vocab_file", "merge_file"), names, strict=True)))
    texts = [*corpus.NASTY, *corpus.english(300), *corpus.random_texts(300, seed=8), *corpus.NASTY]
    corpus.write_jsonl(tmp_path / "in.jsonl", texts)
    folder = tokenizer_folder(data, tmp_path)
    theirs(
        checkout, tmp_path, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder),
        *["--append-eod"] * append_eod,
    )  # fmt: skip
    compare(tmp_path, data, texts, append_eod)


def test_sentencepiece(checkout, tmp_path):
    """Their tool takes markers in the text for special tokens, so there are none here."""
    data = corpus.sentencepiece(tmp_path)
    texts = [text for text in [*corpus.english(300), *corpus.NASTY] if text.strip()]
    corpus.write_jsonl(tmp_path / "in.jsonl", texts)
    theirs(
        checkout, tmp_path, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer_model,
        "--append-eod",
    )  # fmt: skip
    compare(tmp_path, data, texts, append_eod=True)
