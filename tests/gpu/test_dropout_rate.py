"""Attention's dropout on a GPU: the rate that training really gets, and the same mask forward and backward.

With queries and keys of 0 every probability of row i is 1 / (i + 1). If dimension d of the values is 1 at one key and 0
elsewhere, that of the output is the key's probability after dropout: 0 where it was dropped. If the gradient of the
output is 1 at one row in each dimension, that of the values has the probabilities after the backward pass's dropout.

Shapes: B batch, S sequence, N heads, D head size, H hidden.
"""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.config import ModelConfig
from megatron.config.presets import PRESETS
from megatron.engine.cuda_graphs import CudaRecorder
from megatron.model.attention import SelfAttention
from megatron.model.randomness import run_seeded, seed_generators

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
B, S, N, RATE = 4, 2048, 8, 0.1
HEAD_SIZES = sorted({preset["hidden_size"] // preset["num_attention_heads"] for preset in PRESETS.values()})
KEYS, ROWS = 64, 1024  # the first key and the first row of those that are looked at; all rows can see all keys
WAYS = ["eager", "compiled", "recomputed", "recorded"]


def make_attention(head_size: int, dtype: torch.dtype, device: str = "cuda") -> SelfAttention:
    """Queries and keys are 0, values are the input, and the output is what attention gives."""
    shape = ModelConfig(hidden_size=N * head_size, num_attention_heads=N, attention_dropout=RATE)
    attention = SelfAttention(shape, 0)
    with torch.no_grad():
        for linear, weight in ((attention.qkv, attention.qkv.weight[-N * head_size :]), (attention.dense, None)):
            linear.weight.zero_()
            linear.bias.zero_()
            torch.nn.init.eye_(linear.weight if weight is None else weight)
    return attention.to(device, dtype).train()


def one_at(first: int, head_size: int, like: torch.Tensor) -> torch.Tensor:
    """[B, S, H] with 1 at position ``first`` + d in dimension d of every head."""
    x_BSH = torch.zeros(B, S, N * head_size, dtype=like.dtype, device=like.device)
    d = torch.arange(head_size, device=like.device)
    x_BSH.view(B, S, N, head_size)[:, first + d, :, d] = 1.0
    return x_BSH


def masks(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor, size: int):
    """Which probabilities are kept, forward of all rows [B, S, N, D keys] and backward [B, D keys, N, D rows]."""
    x.grad = None
    y = run(x)
    y.backward(dy)
    kept = y.detach().view(B, S, N, size) != 0
    kept_backward = x.grad[:, KEYS : KEYS + size].view(B, size, N, size) != 0
    return kept, kept_backward


def way_of(way: str, attention: SelfAttention) -> Callable[[torch.Tensor], torch.Tensor]:
    """Attention as training calls it."""
    if way == "compiled":
        return torch.compile(attention, dynamic=False)
    if way == "recomputed":
        return lambda x: run_seeded(attention, x, lambda: seed_generators(7), True)
    return attention


def check(kept: torch.Tensor, kept_backward: torch.Tensor, size: int) -> float:
    """Masks agree, and the rate is the one that was asked for; of rows that see all of the keys."""
    seen = kept[:, KEYS + size :]
    rate = 1 - float(seen.double().mean())
    same = kept[:, ROWS : ROWS + size].permute(0, 3, 2, 1)  # keys before rows, as backward
    assert torch.equal(same, kept_backward)
    assert rate == pytest.approx(RATE, abs=2e-3)
    # heads and sequences have masks of their own
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[:, :, 0], seen[:, :, 1])
    return rate


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_the_rate_is_that_asked_for_and_backward_drops_what_forward_did(size, dtype, way):
    attention = make_attention(size, dtype)
    x = one_at(KEYS, size, attention.qkv.weight).requires_grad_()
    dy = one_at(ROWS, size, attention.qkv.weight)
    seed_generators(7)
    if way != "recorded":
        run = way_of(way, attention)
        kept, kept_backward = masks(run, x, dy, size)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            masks(run, x, dy, size)
        kernels = [event.key for event in profiled.key_averages()]
        assert kernels
        assert not [name for name in kernels if "cudnn" in name.lower()]
        print(f"\n{way}, {dtype}, head size {size}: {check(kept, kept_backward, size):.4f}")
        return
    recorder = CudaRecorder(x.device, 1)
    compiled = way_of("compiled", attention)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def function() -> None:
        recorder.draw_from(0)
        found[:] = [masks(compiled, x, dy, size)]

    recorder.seed([1])
    for _ in range(3):
        recorder.run(function)
    recorder.record(function)
    replayed = []
    for seed in (1, 2, 1):
        recorder.seed([seed])
        recorder.replay()
        replayed.append([mask.clone() for mask in found[0]])
        print(f"\n{way}, {dtype}, head size {size}: {check(*replayed[-1], size):.4f}")
    assert not torch.equal(replayed[0][0], replayed[1][0])
    assert torch.equal(replayed[0][0], replayed[2][0])


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_without_dropout_the_choice_is_torchs(size):
    """Attention with dropout 0 runs the kernels that torch prefers, whatever these are on this GPU."""
    attention = make_attention(size, torch.bfloat16)
    attention.dropout = 0.0
    x = one_at(KEYS, size, attention.qkv.weight)
    qkv = torch.zeros(3, B, N, S, size, dtype=x.dtype, device=x.device)

    def library(run: Callable[[], torch.Tensor]) -> str | None:
        run()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
        names = " ".join(event.key.lower() for event in profiled.key_averages())
        return next((word for word in ("cudnn", "flash", "fmha") if word in names), None)

    with torch.no_grad():
        ours = library(lambda: attention(x))
        torchs = library(lambda: torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True))
    print(f"\nwithout dropout, head size {size}: {ours}")
    assert ours is not None
    assert ours == torchs
