"""Layers with different degrees of expert parallelism in one model, against plain torch on one process."""

from pathlib import Path

import pytest
import torch
from distributed import test_pipeline_engine as pipelines
from distributed.spawn import run_distributed
from distributed.test_engine import DROPLESS, MOE_TOP2, config, reference, train
from distributed.test_engine_resume import compare, save_and_resume

from megatron.config import MoEConfig, RunConfig

PYRAMID = MoEConfig(num_experts=(4, 8), moe_min_capacity=1, moe_loss_coeff=0.5)
TP2 = {"tensor_model_parallel_size": 2}
SP2 = TP2 | {"sequence_parallel": True}
ETP2 = SP2 | {"enable_expert_tensor_parallelism": True}

CASES: dict[int, dict[str, RunConfig]] = {
    4: {
        "EP 2 and 4": config(PYRAMID, (2, 4)),
        "EP 4 and 1": config(PYRAMID, (4, 1)),
        "EP 2 and 4, bf16": config(PYRAMID, (2, 4), "bf16"),
        "top-2, EP 1 and 2": config(MOE_TOP2, (1, 2)),
        "dropless residual, 8 experts on 4 and 8 on 2": config(DROPLESS, (4, 2)),
        "TP2, EP 1 and 2": config(PYRAMID, (1, 2), layout=TP2),
        "TP2 SP, EP 2 and 1": config(PYRAMID, (2, 1), layout=SP2),
        "TP2 SP ETP, EP 2 and 1": config(PYRAMID, (2, 1), layout=ETP2),
    },
    8: {
        "EP 2 and 4, expert-data 4 and 2": config(PYRAMID, (2, 4)),
        "TP2, EP 2 and 4": config(PYRAMID, (2, 4), layout=TP2),
    },
}


def check(name: str, run: RunConfig, history: list, parameters: dict) -> None:
    expected, weights = reference(run.moe)
    message = f"{name}: {history} against {expected}"
    if run.optimizer.precision == "bf16":  # the first losses and norms; later ones drift apart
        torch.testing.assert_close(history[0], expected[0], rtol=2e-2, atol=2e-2, msg=message)
        return
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=message)
    assert parameters.keys() == weights.keys()
    errors = {key: float((parameters[key] - value).abs().max()) for key, value in weights.items()}
    assert all(error <= 1e-5 for error in errors.values()), f"{name}: {errors}"  # NaN fails too
    assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"


@pytest.mark.distributed
@pytest.mark.parametrize("size", CASES)
def test_layers_of_different_degrees_train_as_plain_torch(size):
    results = run_distributed(train, size, list(CASES[size].values()))[0]
    for (name, run), (history, parameters) in zip(CASES[size].items(), results, strict=True):
        check(name, run, history, parameters)


@pytest.mark.distributed
def test_stages_of_a_pipeline_may_have_different_degrees():
    """One stage has only the layer of degree 1, the other only that of degree 2."""
    runs = {name: pipelines.layout(PYRAMID, 2, degrees) for name, degrees in {"1, 2": (1, 2), "2, 1": (2, 1)}.items()}
    runs["bf16"] = pipelines.layout(PYRAMID, 2, (1, 2), precision="bf16")
    results = run_distributed(pipelines.train, 4, list(runs.values()))[0]
    for (name, run), (history, parameters, _) in zip(runs.items(), results, strict=True):
        check(name, run, history, parameters)


@pytest.mark.distributed
def test_a_checkpoint_of_several_degrees_resumes_as_one_degree_and_back(tmp_path: Path):
    layouts = [((2, 4), "fp32"), (1, "fp32"), (4, "fp32")]
    results = run_distributed(save_and_resume, 4, str(tmp_path), PYRAMID, layouts, layouts)[0]
    for saver in layouts:
        for loader in layouts:
            compare(results[saver, loader], results[saver], f"saved {saver}, resumed {loader}")
