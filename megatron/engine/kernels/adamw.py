"""AdamW in one pass: clip, update moments and fp32 weights, and write the weights that the model computes with.

The references are :func:`megatron.engine.optim.adamw.update` and :func:`megatron.engine.bf16_update.square_sum`.

Bytes of a weight with moments of m bytes each and a gradient of g: 4 + 2 m + g are read and 6 + 2 m written, 28 or 30
with fp32 moments. As separate passes, clipping and casting would add 14.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron.engine.optim.adamw import SPREAD, Rates
from megatron.engine.optim.base import ParameterSlice
from megatron.moe.kernels.slots import mix

BLOCK = 1024  # elements of a program
PROGRAMS = 1024  # of a sum of squares
SUM_BLOCK = 4096  # elements that such a program adds at a time
_SPREAD = tl.constexpr(SPREAD)
_jit: Any = triton.jit  # a launch takes numbers for constexpr, and num_warps, which its type does not tell


@triton.jit
def _store(ptr, x, random, inside):
    """Store fp32 ``x``, to bf16 with stochastic rounding by the lowest 16 bits of ``random``."""
    if ptr.dtype.element_ty == tl.bfloat16:
        x = ((x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=inside)


@_jit
def _update(
    master_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, scalars_ptr, numel,
    keep, beta1, rest1, beta2, rest2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(scalars_ptr)
    if factor == factor:
        step_size, root = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(tl.float32) * beta1 + g * rest1
        v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * rest2
        p = tl.load(master_ptr + at, mask=inside, other=0.0)
        random = mix(p.to(tl.uint32, bitcast=True), tl.load(scalars_ptr + 3).to(tl.uint32) * _SPREAD)
        p = p * keep - step_size * m / (tl.sqrt(v) / root + eps)
        _store(exp_avg_ptr + at, m, random >> 16, inside)
        _store(exp_avg_sq_ptr + at, v, random, inside)
        tl.store(master_ptr + at, p, mask=inside)
        tl.store(weight_ptr + at, p.to(weight_ptr.dtype.element_ty), mask=inside)


def update(slice_: ParameterSlice, rates: Rates) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019), in one launch; the host waits for nothing."""
    numel = slice_.master.numel()
    if numel:
        _update[(triton.cdiv(numel, BLOCK),)](
            slice_.master, slice_.gradient, slice_.states["exp_avg"], slice_.states["exp_avg_sq"], slice_.weight,
            rates.scalars, numel,
            1 - rates.lr * rates.weight_decay, rates.beta1, 1 - rates.beta1, rates.beta2, 1 - rates.beta2, rates.eps,
            BLOCK,
        )  # fmt: skip


@_jit
def _square_sums(x_ptr, sums_ptr, numel, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program * BLOCK, numel, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


def square_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements of contiguous tensors, in a launch for each; deterministic."""
    sums = tensors[0].new_zeros((len(tensors), PROGRAMS), dtype=torch.float32)
    for x, sums_x in zip(tensors, sums, strict=True):
        if x.numel():
            _square_sums[(min(PROGRAMS, triton.cdiv(x.numel(), SUM_BLOCK)),)](
                x, sums_x, x.numel(), SUM_BLOCK, num_warps=8
            )
    return sums.sum(dtype=torch.float64)
