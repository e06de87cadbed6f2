"""Training needs of an engine what the protocol says, and nothing of DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_run import SEQ, environment, flags, make_dataset, make_tokenizer, records

from megatron.checkpoint import latest
from megatron.engine.base import AsyncScalar, StepResult
from megatron.model.loss import LossSums

SCRIPT = Path(__file__).with_name("plain_engine.py")


def test_an_engine_in_plain_torch_trains_validates_saves_and_resumes(tmp_path):
    make_tokenizer(tmp_path)
    make_dataset(tmp_path)
    save, update = tmp_path / "run", 16 * SEQ
    runs = [
        flags(tmp_path, save=save, load=save, lr=0.1, save_interval=2, eval_interval=2, train_tokens=updates * update)
        for updates in (4, 8)
    ]
    command = [sys.executable, SCRIPT, *runs[0], "--", *runs[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = records(save, "train")
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["resumed_at_tokens"] for record in records(save, "run")] == [None, 4 * update]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert len(records(save, "valid")) >= 4
    checkpoint = latest(save)
    assert checkpoint is not None
    (file,) = Path(checkpoint).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        states = {name.split(".")[0] for name in opened.keys()}  # noqa: SIM118
    assert states == {"model", "momentum"}


@pytest.mark.parametrize(("norm", "skipped"), [(2.5, False), (float("nan"), True), (float("inf"), True)])
def test_an_update_whose_norm_is_not_finite_was_skipped(norm: float, skipped: bool):
    sums = LossSums(torch.zeros(4), [], torch.zeros(0))
    for given in (norm, AsyncScalar(torch.tensor(norm))):
        result = StepResult(sums, 1e-3, given)
        assert result.skipped == skipped
        assert result.grad_norm == (float("inf") if skipped else 2.5)
