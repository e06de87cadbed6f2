"""A pipeline trains, logs, validates, saves, and is resumed by one process."""

import pytest
import tiny_run
import torch

pytestmark = pytest.mark.distributed
MOE = {"num_experts": 4, "num_layers": 4, "moe_z_loss_coeff": 0.01}


def test_a_pipeline_and_one_process_train_the_same_and_take_over_from_each_other(server, corpus, tmp_path):
    pipeline, one, resumed = tmp_path / "pipeline", tmp_path / "one", tmp_path / "resumed"
    arguments = tiny_run.flags(corpus, save=pipeline, pipeline_model_parallel_size=2, **MOE)
    assert server.train(2, arguments).output().count("pipeline stages: layers 0-") == 1
    server.train(1, tiny_run.flags(corpus, save=one, **MOE))
    server.train(1, tiny_run.flags(corpus, save=resumed, load=pipeline / "step_00000003", **MOE))

    expected = tiny_run.curve(one)
    assert len(expected) == 8
    compare(tiny_run.curve(pipeline), expected)
    compare(tiny_run.curve(resumed), {tokens: value for tokens, value in expected.items() if tokens > 3 * 16 * 32})
    for folder in (pipeline, resumed):
        for kind in ("train", "valid"):
            found, reference = (tiny_run.records(where, kind)[-1] for where in (folder, one))
            for key in ("loss", "aux_loss", "z_loss"):
                assert found[key] == pytest.approx(reference[key], rel=1e-4)
            assert found["experts"] == reference["experts"]


def compare(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for tokens, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[tokens]), torch.tensor(value), rtol=1e-4, atol=1e-4)
