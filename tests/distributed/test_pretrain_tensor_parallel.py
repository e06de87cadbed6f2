"""The trainer on tensor-parallel processes, its checkpoints on one."""

import pytest
import tiny_run
import torch

from megatron.inference.load import find_checkpoint, load_model

pytestmark = pytest.mark.distributed


def test_what_two_tensor_parallel_processes_train_one_resumes_and_loads(server, corpus, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    model = {"num_experts": 4, "hidden_dropout": 0, "attention_dropout": 0}
    shared = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    server.train(2, tiny_run.flags(corpus, save=two, **model, **shared))
    losses = [record["loss"] for record in tiny_run.records(two, "train")]
    assert losses[-1] < losses[0] - 0.2
    assert tiny_run.records(two, "run")[0]["tensor_parallel"] == 2

    server.train(1, tiny_run.flags(corpus, save=one, load=two / "step_00000003", **model))
    expected = tiny_run.curve(two)
    found = tiny_run.curve(one)
    assert len(found) == 5
    for tokens, value in found.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(expected[tokens]), rtol=1e-5, atol=1e-5)
    valid = [tiny_run.records(folder, "valid")[-1]["loss"] for folder in (one, two)]
    assert valid[0] == pytest.approx(valid[1], abs=1e-5)

    loaded = [load_model(find_checkpoint(folder)) for folder in (one, two)]
    assert loaded[0].vocab_size == 128
    for (name, mine), theirs in zip(loaded[0].named_parameters(), loaded[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_another_padding_that_the_layout_cannot_share_is_told(server, corpus, tmp_path):
    save = tmp_path / "save"
    odd = {"make_vocab_size_divisible_by": 123, "exit_tokens": 512}
    server.train(1, tiny_run.flags(corpus, save=save, **odd))
    arguments = tiny_run.flags(corpus, load=save, tensor_model_parallel_size=2, make_vocab_size_divisible_by=123)
    job = server.start(2, arguments)
    assert 0 not in job.wait()
    assert "padded vocabulary of 123 cannot be shared evenly by --tensor-model-parallel-size 2" in job.output()
