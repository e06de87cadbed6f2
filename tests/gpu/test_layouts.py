"""Layouts of two GPUs over NCCL train as one GPU does."""

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_layouts import LAYOUTS, MODELS
from distributed.tiny_training import Trained, differences, run_config, train
from gpu.processes import needs_two_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    needs_two_gpus,
]
OPTIONS = {name: options for name, (size, options) in LAYOUTS.items() if size == 2}
TOLERANCES = {"bf16": 2e-2, "fp16": 2e-3}  # of the loss, after three updates
CASES = [
    (layout, model, precision)
    for layout in OPTIONS
    for precision in ("fp32", *TOLERANCES)
    for model, moe in MODELS.items()
    if (moe.enabled or layout not in ("EP2", "ETP2")) and (precision == "fp32" or model == "top-1, capacity")
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    runs = [run_config(moe, device="cuda") for moe in MODELS.values()]
    return dict(zip(MODELS, run_distributed(train, 1, runs, backend="nccl")[0], strict=True))


@pytest.fixture(scope="module")
def together() -> dict[tuple[str, str, str], Trained]:
    """All trainings in one pair of processes: most of the time goes into starting these."""
    runs = [
        run_config(MODELS[model], precision, device="cuda", **OPTIONS[layout]) for layout, model, precision in CASES
    ]
    return dict(zip(CASES, run_distributed(train, 2, runs, timeout=400, backend="nccl")[0], strict=True))


@pytest.mark.parametrize(("layout", "model", "precision"), CASES)
def test_two_gpus_train_as_one(layout: str, model: str, precision: str, alone: dict, together: dict):
    """In fp32 to 1e-4 and not 1e-5: matrix products of other sizes add up in another order."""
    found, expected = together[layout, model, precision], alone[model]
    if precision == "fp32":
        errors = differences(found, expected)
        assert all(error <= 1e-4 for error in errors), errors
    else:
        losses = torch.tensor(expected.losses)
        torch.testing.assert_close(torch.tensor(found.losses), losses, rtol=TOLERANCES[precision], atol=0.0)
