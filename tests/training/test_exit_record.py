"""Whether a run is finished, as scripts find out."""

import subprocess
import sys

import pytest
from tiny_run import ROOT

from megatron.config import CheckpointConfig, ModelConfig, RunConfig, TrainingConfig
from megatron.training.clock import Clock
from megatron.training.exit_record import FILE, finished, write_exit_record


def config(save, tokens: int = 1000, exit_tokens: int | None = None) -> RunConfig:
    return RunConfig(
        model=ModelConfig(seq_length=10),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=1, train_tokens=tokens),
        checkpoint=CheckpointConfig(save=None if save is None else str(save), exit_tokens=exit_tokens),
    )


@pytest.fixture
def ended(tmp_path):
    """The folder of a run that was saved after 13 batches of 80 tokens, more than 1000."""
    (tmp_path / "latest").write_text("step_00000013\n")
    write_exit_record(config(tmp_path), Clock(10, samples=104, steps=13), "all tokens are trained on")
    return tmp_path


def test_a_run_is_finished_for_the_flags_that_it_was_asked_with(ended):
    assert "1040 tokens" in finished(config(ended))
    assert finished(config(ended, tokens=1041)) is None
    assert finished(config(ended, tokens=5000, exit_tokens=1040))
    assert finished(config(ended, tokens=5000, exit_tokens=1041)) is None


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"step": 13, "samples": "x"}', "\0"])
def test_a_record_that_cannot_be_read_says_nothing(ended, content):
    (ended / FILE).unlink()
    if content is not None:
        (ended / FILE).write_text(content)
    assert finished(config(ended)) is None


def test_the_checkpoint_has_to_be_there(ended):
    (ended / "latest").write_text("step_00000012\n")
    assert finished(config(ended)) is None
    (ended / "latest").unlink()
    assert finished(config(ended)) is None


def test_without_a_folder_there_is_nothing_to_say():
    write_exit_record(config(None), Clock(10), "all tokens are trained on")
    assert finished(config(None)) is None


def test_a_folder_that_takes_nothing_does_no_harm(tmp_path):
    write_exit_record(config(tmp_path / "missing"), Clock(10), "all tokens are trained on")


@pytest.mark.parametrize(("tokens", "status"), [("1000", 0), ("2000", 1)])
def test_the_command_line(ended, tokens, status):
    words = ["--save", str(ended), "--seq-length", "10", "--global-batch-size", "8", "--micro-batch-size", "1"]
    words += ["--data-path", "absent", "--tokenizer-type", "ByteTokenizer"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "run_finished.py"), *words, "--train-tokens", tokens],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, "")
    assert ("finished" in done.stdout) == (status == 0)


def test_flags_with_which_no_run_can_start(ended):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "run_finished.py"), "--save", str(ended), "--train-tokens", "1M"],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[1].split(";")[0].strip() for line in done.stderr.splitlines()] == [
        "--data-path is missing (launch scripts",
        "--tokenizer-type GPT2BPETokenizer needs --vocab-file, which is missing",
        "--tokenizer-type GPT2BPETokenizer needs --merge-file, which is missing",
    ]
