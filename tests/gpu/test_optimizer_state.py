"""The optimizer's state in CPU memory and 8-bit moments on a GPU: same training, less GPU memory; compiled as eager."""

import dataclasses
import gc

import pytest
import torch
from gpu.test_engine import BATCH, SEQ, build, config, micro_batch, topology, train  # noqa: F401 (a fixture)

from megatron.checkpoint import data_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STEPS = 10


def trained(run, group) -> tuple[list[float], list[float], int, dict[str, torch.Tensor]]:
    """Losses and gradient norms; bytes that stay on the GPU between updates; the fp32 weights."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = build(run, group)
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step([micro_batch(4 * step + i) for i in range(4)], (step + 1) * BATCH * SEQ)
        losses.append(float(result.sums.losses[0] / result.sums.losses[3]))
        norms.append(result.grad_norm)
    held = torch.cuda.memory_allocated() - before
    tensors = {t.name: torch.cat([data_of(b.tensor).flatten().cpu() for b in t.boxes]) for t in engine.saved_tensors()}
    return losses, norms, held, tensors


def parameters(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for name, value in tensors.items() if name.startswith("model."))


def compiled(run, compile: bool):
    return dataclasses.replace(run, training=dataclasses.replace(run.training, compile=compile))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_offloaded_updates_are_those_on_the_gpu(topology, precision: str, tolerance: float):  # noqa: F811
    losses, norms, held, tensors = trained(config(precision), topology)
    found = trained(config(precision, optimizer_cpu_offload=True), topology)
    assert found[0] == pytest.approx(losses, rel=tolerance)
    assert found[1] == pytest.approx(norms, rel=10 * tolerance)
    count = parameters(tensors)
    assert held - found[2] > 0.9 * 12 * count  # fp32 weights and two moments
    assert found[3].keys() == tensors.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_8_bit_moments_follow_fp32_ones_and_take_a_quarter(topology, precision: str):  # noqa: F811
    pytest.importorskip("torchao", reason="needs the extra [8bit]")
    losses, _, held, tensors = trained(config(precision), topology)
    found = trained(config(precision, optimizer="adamw8bit"), topology)
    assert found[0] == pytest.approx(losses, rel=0.05, abs=0.05)
    assert held - found[2] > 0.9 * 5.9 * parameters(tensors)


def test_compiled_8_bit_updates_are_those_of_eager_ones(topology):  # noqa: F811
    pytest.importorskip("torchao", reason="needs the extra [8bit]")
    run = config("fp32", optimizer="adamw8bit")
    eager, fused = (trained(compiled(run, choice), topology) for choice in (False, True))
    assert fused[0] == pytest.approx(eager[0], rel=1e-2)
    assert fused[0][:2] == pytest.approx(eager[0][:2], rel=1e-4)
