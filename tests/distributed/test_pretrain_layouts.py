"""The trainer as users start it on eight processes: all kinds of parallelism, killed, resumed in another layout."""

import os
import re
import signal

import pytest
import tiny_run
import torch
from distributed.started import children, output_until_the_end, start, wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]  # eight processes
MODEL = {"num_experts": 4, "num_layers": 4, "hidden_dropout": 0, "attention_dropout": 0, "check_replicas": 2}
BEFORE = {
    "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "moe_expert_parallel_size": 2,
}
AFTER = {"moe_expert_parallel_size": 4}  # and two replicas of each expert


def test_pipeline_tensor_and_expert_parallel_killed_and_resumed_as_expert_and_data_parallel(tmp_path):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    alone, save = tmp_path / "alone", tmp_path / "save"
    done = tiny_run.train(1, tiny_run.flags(tmp_path, save=alone, **MODEL))
    assert done.returncode == 0, done.stdout + done.stderr

    process = start(8, tiny_run.flags(tmp_path, save=save, load=save, **MODEL, **BEFORE))
    wait_for("step      5", process)
    os.kill(children(process.pid)[5], signal.SIGKILL)
    output = output_until_the_end(process, 60)
    assert process.returncode != 0
    assert re.search(r"error on rank \d: rank 5 \(host", output), output

    done = tiny_run.train(8, tiny_run.flags(tmp_path, save=save, load=save, **MODEL, **AFTER))
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny_run.records(save, "run")[-1]["resumed_at_tokens"] in (3 * 16 * 32, 6 * 16 * 32)
    found, expected = tiny_run.curve(save), tiny_run.curve(alone)
    assert found.keys() == expected.keys()
    for tokens, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[tokens]), torch.tensor(value), rtol=1e-5, atol=1e-5)
    valid = [tiny_run.records(folder, "valid")[-1]["loss"] for folder in (alone, save)]
    assert valid[0] == pytest.approx(valid[1], abs=1e-5)
