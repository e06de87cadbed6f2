"""The array job, with SLURM's variables played: its shards, merged, are what one run makes."""

import os
import subprocess
import sys
from pathlib import Path

import corpus

from megatron.data.preprocess import preprocess

SCRIPT = corpus.ROOT / "examples_moe" / "slurm" / "preprocess_array.sh"


def start(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    kept |= {"PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(corpus.ROOT)} | variables
    return subprocess.run(["bash", str(SCRIPT), *words], env=kept, cwd=folder, capture_output=True, text=True)


def test_shards_and_merge(tmp_path):
    corpus.write_jsonl(tmp_path / "in.jsonl", corpus.english(50))
    given = {"INPUT": "in.jsonl", "OUTPUT": "out", "TOKENIZER": "--tokenizer-type ByteTokenizer"}
    given["EXTRA_ARGS"] = "--log-interval 10 --workers 0"
    for shard in ("1", "0"):
        done = start(tmp_path, **given, SLURM_ARRAY_TASK_ID=shard, SLURM_ARRAY_TASK_COUNT="2")
        assert done.returncode == 0, done.stderr
        if shard == "1":
            early = start(tmp_path, "merge", **given)
            assert (early.returncode, early.stderr[:6]) == (1, "error:")
    done = start(tmp_path, "merge", **given)
    assert done.returncode == 0, done.stderr
    data = corpus.DataConfig(tokenizer_type="ByteTokenizer")
    preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "one"), data, append_eod=True, workers=0)
    for suffix in (".bin", ".idx"):
        merged, one = (tmp_path / f"{name}_text_document{suffix}" for name in ("out", "one"))
        assert merged.read_bytes() == one.read_bytes()


def test_what_is_not_set_is_named(tmp_path):
    done = start(tmp_path, OUTPUT="out", TOKENIZER="--tokenizer-type ByteTokenizer")
    assert done.returncode != 0
    assert "INPUT is not set" in done.stderr
    given = {"INPUT": "in.jsonl", "OUTPUT": "out", "TOKENIZER": "x"}
    assert "submit it with sbatch" in start(tmp_path, **given).stderr
    assert "neither shard nor merge" in start(tmp_path, "other", **given).stderr
