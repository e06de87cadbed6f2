"""A tiny but real run for tests: text, tokenizer, .bin/.idx dataset, and the trainer started as a user starts it."""

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = [f"w{number}" for number in range(120)]
SEQ = 32


def make_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer.json with an end-of-document token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def make_dataset(folder: Path, documents: int = 200) -> Path:
    """Documents in which each word mostly decides the next; returns the dataset's prefix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    import numpy

    random.seed(7)
    prefix = folder / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(documents):
        token, document = random.randrange(len(WORDS)), []
        for _ in range(random.randint(20, 80)):
            document.append(token)
            token = (token * 7 + random.choice((1, 1, 1, 5))) % len(WORDS)
        builder.add_document([*document, len(WORDS) + 1], [len(document) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def flags(folder: Path, **changes: object) -> list[str]:
    """Command-line flags of a 2-layer model on the tiny dataset; keyword ``lr=1`` replaces ``--lr``."""
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQ,
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "train_tokens": 16 * SEQ * 8,
        "lr": 5e-3,
        "lr_warmup_tokens": 16 * SEQ,
        "eval_interval": 4,
        "eval_iters": 1,
        "log_interval": 1,
        "save_interval": 3,
        "data_path": folder / "text",
        "split": "90,10,0",
        "tokenizer_type": "HFTokenizer",
        "tokenizer_model": folder / "tokenizer.json",
        "num_workers": 0,
        "device": "cpu",
        "fp32": True,
    } | changes
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else [str(item) for item in (value if isinstance(value, tuple) else (value,))]
    return words


def environment() -> dict[str, str]:
    """The environment of a started process: one thread, no launcher's left-overs."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(processes: int, arguments: list[str]) -> list[str]:
    """``torchrun`` with ``processes`` ranks of the trainer."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*starter, str(ROOT / "pretrain_gpt_moe.py"), *arguments]


def train(processes: int, arguments: list[str], timeout: float = 180) -> subprocess.CompletedProcess:
    """Run the trainer to its end; output and errors come back as text."""
    return subprocess.run(
        command(processes, arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def records(folder: Path, kind: str) -> list[dict]:
    """The records of one kind in ``folder``'s log, in the order written."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def curve(folder: Path) -> dict[int, tuple[float, float]]:
    """Tokens -> (loss, gradient norm) of the training records; a later record of the same tokens wins."""
    return {r["tokens"]: (r["loss"], r["grad_norm"]) for r in records(folder, "train")}
