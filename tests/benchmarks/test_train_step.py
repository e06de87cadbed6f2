"""The benchmark of whole training steps, with a model that a CPU manages."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import train_step

TINY = ["--device", "cpu", "--steps", "2", "--set", "num_layers=2", "hidden_size=32", "num_attention_heads=2"]
TINY += ["seq_length=16"]
NANOGPT = """
import torch
from torch import nn

class GPTConfig:
    def __init__(self, **values):
        self.__dict__ |= values

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), rate, betas)

    def forward(self, x, y):
        logits = self.embedding(x) @ self.embedding.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
"""


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path):
    """In a process of its own, for the groups of processes that the engine leaves behind."""
    (tmp_path / "model.py").write_text(NANOGPT)
    file = tmp_path / "step.json"
    words = ["--runs", "125M:2", "125M+4:1:2", *TINY, "--nanogpt", str(tmp_path), "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks.train_step", *words]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # a compiler for CPUs takes most of the time
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    out = json.loads(file.read_text())
    rows = {row["run"]: row for row in out["rows"]}
    assert list(rows) == ["125M:2 ours", "125M:2 nanoGPT", "125M+4:1:2 ours"], done.stdout
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3)
        assert row["tflops"] > 0
        assert row["memory_gb"] is None
    assert rows["125M+4:1:2 ours"]["parameters"] > rows["125M:2 ours"]["parameters"]
    assert (out["device"], out["precision"]) == ("cpu", "bf16")


@pytest.mark.exhaustive
def test_documents_are_kept_apart(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--runs",
        "125M+4:2",
        *TINY,
        "--json",
        str(tmp_path / "json"),
    ]
    done = subprocess.run([*command, "--documents", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "json").read_text())
    assert [row["run"] for row in out["rows"]] == ["125M+4:2 ours"], done.stdout
    assert out["documents"] == 4


def test_documents_have_the_asked_length():
    args = train_step.parse_args(["--documents", "50", "--set", "seq_length=4096"])
    made = train_step.batch(train_step.describe("125M:16", args), 0, args.documents)
    restarts = int((made["position_ids"] == 0).sum()) - 16
    assert restarts == pytest.approx(16 * 4096 / 50, rel=0.1)
    assert int((made["cu_seqlens"].diff() > 0).sum()) == restarts + 16
    plain = train_step.batch(train_step.describe("125M:2", train_step.parse_args([])), 0)
    assert plain.keys() == {"tokens", "labels", "loss_mask", "sample_index"}


def test_options_of_all_runs_can_be_set():
    args = train_step.parse_args([*TINY, "init_method_std=0.5"])
    run = train_step.describe("125M+4:3:2", args)
    assert (run.model.num_layers, run.model.hidden_size, run.model.init_method_std) == (2, 32, 0.5)
    assert (run.training.micro_batch_size, run.training.global_batch_size, run.moe.num_experts) == (3, 6, (4,))
    with pytest.raises(SystemExit, match="--set num_layers: expected OPTION=VALUE"):
        train_step.describe("125M:1", train_step.parse_args(["--set", "num_layers"]))
