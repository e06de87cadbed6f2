"""Layouts of two GPUs over NCCL train as one GPU does."""

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_layouts import LAYOUTS, MODELS
from distributed.tiny_training import TOP1, differences, run_config, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PAIRS = {name: options for name, (size, options) in LAYOUTS.items() if size == 2}


def run(models: list, size: int, precision: str = "fp32", **options) -> list:
    runs = [run_config(moe, precision, device="cuda", **options) for moe in models]
    return run_distributed(train, size, runs, timeout=300, backend="nccl")[0]


@pytest.fixture(scope="module")
def alone() -> dict:
    return dict(zip(MODELS, run(list(MODELS.values()), 1), strict=True))


@pytest.mark.parametrize("layout", PAIRS)
def test_two_gpus_train_as_one(layout: str, alone: dict):
    """To 1e-4 and not 1e-5: matrix products of other sizes add up in another order."""
    options = PAIRS[layout]
    models = {name: moe for name, moe in MODELS.items() if moe.enabled or layout not in ("EP2", "ETP2")}
    for name, found in zip(models, run(list(models.values()), 2, **options), strict=True):
        errors = differences(found, alone[name])
        assert all(error <= 1e-4 for error in errors), f"{layout}, {name}: {errors}"


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_two_gpus_in_half_precision_follow_one_in_fp32(layout: str, precision: str, tolerance: float, alone: dict):
    (found,) = run([TOP1], 2, precision, **PAIRS[layout])
    expected = torch.tensor(alone["top-1, capacity"].losses)
    torch.testing.assert_close(torch.tensor(found.losses), expected, rtol=tolerance, atol=0.0)
