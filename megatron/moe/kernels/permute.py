"""Permute and unpermute: tokens into the rows of their experts, and expert outputs back into the order of the tokens.

Every row is written once, so results are deterministic, and each byte is moved once: at b bytes a number, ``gather``
reads and writes about (T + R) H b bytes.

``gather``, ``combine`` and ``gather_gradients`` are parts of the top-1 layer (:mod:`megatron.moe.kernels.top1_layer`),
which applies gates to activations. :func:`permute` and :func:`unpermute` are for K experts of each token, and autograd
knows their backward passes:

    permute      x_R = x[token of r]                    dx_t = sum over the rows of t of dx_r
    unpermute    y_t = sum over k of gate_tk * y_row    dy_r = gate of r * dy[token of r], d_gate of r = dy[token] . y_r

Shapes: T tokens, K experts of each token, N = T * K assignments, H hidden, R rows of all buffers, L experts.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron.moe.kernels.jit import cdiv, jit, next_power_of_2


def gather_reference(x_TH: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Row ``index_R[r]`` of ``x_TH`` for each r; zeros where the index is negative. [R, H]"""
    return x_TH[index_R.clamp(min=0).long()].masked_fill((index_R < 0)[:, None], 0.0)


def combine_reference(
    y_RH: torch.Tensor, bias_LH: torch.Tensor, row_T: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor
) -> torch.Tensor:
    """Expert output + gate * bias of the expert, of each token; zeros where it has no row (a negative one). [T, H]"""
    biases_TH = bias_LH[expert_T.long()].to(gate_T.dtype) * gate_T[:, None]
    output_TH = gather_reference(y_RH, row_T).to(gate_T.dtype) + biases_TH
    return output_TH.masked_fill((row_T < 0)[:, None], 0.0).to(y_RH.dtype)


class RowMap(NamedTuple):
    """Which row each assignment has, and which assignment each row; -1 for none."""

    row_N: torch.Tensor  # int32
    assignment_R: torch.Tensor  # int32; assignment t * K + k is choice k of token t


def permute_reference(x_TH: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """The token of each row's assignment, zeros without one. [R, H]"""
    K = row_map.row_N.numel() // x_TH.size(0)
    return gather_reference(x_TH, row_map.assignment_R.where(row_map.assignment_R < 0, row_map.assignment_R // K))


def unpermute_reference(y_RH: torch.Tensor, gate_TK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """The sum of gate * expert output over each token's assignments that have a row. [T, H]"""
    y_TKH = gather_reference(y_RH, row_map.row_N).view(*gate_TK.shape, -1)
    return (y_TKH * gate_TK[..., None]).sum(1).to(y_RH.dtype)


@jit
def _gather(
    x_ptr, index_ptr, gate_ptr, out_ptr, gate_R_ptr, H, K: tl.constexpr, GATED: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.load(index_ptr + row)
    readable = tl.where(index >= 0, H, 0)
    index = tl.maximum(index, 0)
    if GATED:
        tl.store(gate_R_ptr + row, tl.where(readable > 0, tl.load(gate_ptr + index), 0.0))
    token = (index // K).to(tl.int64)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        x = tl.load(x_ptr + token * H + h, mask=h < readable, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * H + h, x, mask=h < H)


@jit
def _combine(y_ptr, bias_ptr, row_ptr, expert_ptr, gate_ptr, out_ptr, H, BH: tl.constexpr):
    token = tl.program_id(0)
    row = tl.load(row_ptr + token)
    expert = tl.load(expert_ptr + token)
    gate = tl.load(gate_ptr + token)
    readable = tl.where(row >= 0, H, 0)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        y = tl.load(y_ptr + row.to(tl.int64) * H + h, mask=h < readable, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * H + h, mask=h < readable, other=0.0).to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * H + h, (y + bias * gate).to(out_ptr.dtype.element_ty), mask=h < H)


@jit
def _gather_and_dot(dy_ptr, bias_ptr, token_ptr, expert_ptr, out_ptr, dot_ptr, H, parts, BH: tl.constexpr):
    """Gather dy into the rows of the buffers, and take each row's product with its expert's bias."""
    row = tl.program_id(0)
    token = tl.load(token_ptr + row)
    readable = tl.where(token >= 0, H, 0)
    expert = tl.load(expert_ptr + tl.maximum(token, 0))
    total = tl.zeros((BH,), dtype=tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = tl.load(dy_ptr + token.to(tl.int64) * H + h, mask=h < readable, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * H + h, dy, mask=h < H)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * H + h, mask=h < readable, other=0.0)
        total += dy.to(tl.float32) * bias.to(tl.float32)
    tl.store(dot_ptr + row.to(tl.int64) * parts, tl.sum(total, axis=0))


@jit
def _row_map_kernel(
    expert_ptr, slot_ptr, first_ptr, row_ptr, assignment_ptr, N, E, C, chunk, expert_T, expert_K, slot_T, slot_K,
    K: tl.constexpr, B: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Both directions of a RowMap; experts and slots have strides."""
    n = tl.program_id(0) * B + tl.arange(0, B)
    t, k = (n // K).to(tl.int64), n % K
    expert = tl.load(expert_ptr + t * expert_T + k * expert_K, mask=n < N, other=0)
    slot = tl.load(slot_ptr + t * slot_T + k * slot_K, mask=n < N, other=0)
    if SORTED:
        kept = n < N
        row = tl.load(first_ptr + expert, mask=kept, other=0) + slot
    else:
        kept = (n < N) & (slot < C)
        first = slot // chunk * chunk
        row = E * first + expert * tl.minimum(C - first, chunk) + slot - first
    tl.store(row_ptr + n, tl.where(kept, row, -1).to(tl.int32), mask=n < N)
    tl.store(assignment_ptr + row, n, mask=kept)


@jit
def _sum(y_ptr, gate_ptr, row_ptr, out_ptr, H, K: tl.constexpr, GATED: tl.constexpr, BH: tl.constexpr):
    """Sum over a token's rows, times their gates if GATED."""
    token = tl.program_id(0)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        total = tl.zeros((BH,), dtype=tl.float32)
        for k in range(K):
            row = tl.load(row_ptr + token * K + k)
            readable = tl.where(row >= 0, H, 0)
            y = tl.load(y_ptr + row.to(tl.int64) * H + h, mask=h < readable, other=0.0).to(tl.float32)
            if GATED:
                y *= tl.load(gate_ptr + token * K + k)
            total += y
        tl.store(out_ptr + token.to(tl.int64) * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


@jit
def _sum_backward(
    dy_ptr, y_ptr, gate_ptr, assignment_ptr, out_ptr, d_gate_ptr, H, K: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """The backward pass of a gated ``_sum``, row by row: dy of the token times the gate; the gate's gradient dy . y."""
    row = tl.program_id(0).to(tl.int64)
    assignment = tl.load(assignment_ptr + row)
    readable = tl.where(assignment >= 0, H, 0)
    token = (tl.maximum(assignment, 0) // K).to(tl.int64)
    gate = tl.load(gate_ptr + assignment, mask=assignment >= 0, other=0.0)
    dot = tl.zeros((BH,), dtype=tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = tl.load(dy_ptr + token * H + h, mask=h < readable, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * H + h, mask=h < readable, other=0.0).to(tl.float32)
        dot += dy * y
        tl.store(out_ptr + row * H + h, (dy * gate).to(out_ptr.dtype.element_ty), mask=h < H)
    tl.store(d_gate_ptr + assignment, tl.sum(dot, axis=0), mask=assignment >= 0)


def _block(H: int) -> int:
    return min(1024, next_power_of_2(H))


def gather(x_TH: torch.Tensor, index_R: torch.Tensor, gate_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gather_reference` of tokens [R, H] and of their gates [R] in one launch; ``index_R`` is int32."""
    H = x_TH.size(1)
    out_RH, gate_R = x_TH.new_empty(index_R.numel(), H), gate_T.new_empty(index_R.numel())
    if out_RH.numel():
        _gather[(index_R.numel(),)](x_TH, index_R, gate_T, out_RH, gate_R, H, 1, True, _block(H))
    return out_RH, gate_R


def combine(
    y_RH: torch.Tensor, bias_LH: torch.Tensor, row_T: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor
) -> torch.Tensor:
    """:func:`combine_reference` in one launch; indices are int32."""
    T, H = row_T.numel(), y_RH.size(1)
    out_TH = y_RH.new_empty(T, H)
    if out_TH.numel():
        _combine[(T,)](y_RH, bias_LH, row_T, expert_T, gate_T, out_TH, H, _block(H))
    return out_TH


def gather_gradients(
    dy_TH: torch.Tensor, bias_LH: torch.Tensor, token_R: torch.Tensor, expert_T: torch.Tensor, dot: torch.Tensor
) -> torch.Tensor:
    """Backward of :func:`combine`: dy of each row's token, [R, H]; ``dot[:, 0]`` gets its product with the bias."""
    R, H = token_R.numel(), dy_TH.size(1)
    out_RH = dy_TH.new_empty(R, H)
    if R:
        _gather_and_dot[(R,)](dy_TH, bias_LH, token_R, expert_T, out_RH, dot, H, dot.size(1), _block(H))
    return out_RH


def buffer_row_map(
    expert_TK: torch.Tensor, slot_TK: torch.Tensor, num_experts: int, capacity: int, chunk: int | None = None
) -> RowMap:
    """Rows of experts' buffers, in two launches: see :meth:`megatron.moe.plan.RoutingPlan.buffer_row_TK`."""
    assignment_R = expert_TK.new_full((num_experts * capacity,), -1, dtype=torch.int32)
    return _row_map(expert_TK, slot_TK, None, assignment_R, num_experts, capacity, chunk or capacity)


def sorted_row_map(expert_TK: torch.Tensor, slot_TK: torch.Tensor, counts_E: torch.Tensor) -> RowMap:
    """Rows sorted by expert: see :meth:`megatron.moe.plan.RoutingPlan.sorted_row_TK`."""
    assignment_R = expert_TK.new_empty(expert_TK.numel(), dtype=torch.int32)
    return _row_map(expert_TK, slot_TK, counts_E.cumsum(0) - counts_E, assignment_R, counts_E.numel(), 0, 1)


def _row_map(
    expert_TK: torch.Tensor,
    slot_TK: torch.Tensor,
    first_E: torch.Tensor | None,
    assignment_R: torch.Tensor,
    E: int,
    C: int,
    chunk: int,
) -> RowMap:
    N, K = expert_TK.numel(), expert_TK.size(1)
    row_N = expert_TK.new_empty(N, dtype=torch.int32)
    if N:
        _row_map_kernel[(cdiv(N, 256),)](
            expert_TK, slot_TK, slot_TK if first_E is None else first_E, row_N, assignment_R, N, E, C, chunk,
            *expert_TK.stride(), *slot_TK.stride(), K, 256, first_E is not None,
        )  # fmt: skip
    return RowMap(row_N, assignment_R)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, row_N, assignment_R):
        ctx.save_for_backward(row_N)
        ctx.shape = T, H = x_TH.shape
        out_RH = x_TH.new_empty(assignment_R.numel(), H)
        grid = (assignment_R.numel(),)
        _gather[grid](x_TH, assignment_R, x_TH, out_RH, out_RH, H, row_N.numel() // T, False, _block(H))
        return out_RH

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH):
        (row_N,) = ctx.saved_tensors
        T, H = ctx.shape
        dx_TH = dx_RH.new_empty(T, H)
        _sum[(T,)](dx_RH.contiguous(), dx_RH, row_N, dx_TH, H, row_N.numel() // T, False, _block(H))
        return dx_TH, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RH, gate_TK, row_N, assignment_R):
        ctx.save_for_backward(y_RH, gate_TK, assignment_R)
        (T, K), H = gate_TK.shape, y_RH.size(1)
        y_TH = y_RH.new_empty(T, H)
        _sum[(T,)](y_RH, gate_TK, row_N, y_TH, H, K, True, _block(H))
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        y_RH, gate_TK, assignment_R = ctx.saved_tensors
        R, H = y_RH.shape
        dy_RH, d_gate_TK = torch.empty_like(y_RH), torch.zeros_like(gate_TK)
        _sum_backward[(R,)](
            dy_TH.contiguous(), y_RH, gate_TK, assignment_R, dy_RH, d_gate_TK, H, gate_TK.size(1), _block(H)
        )
        return dy_RH, d_gate_TK, None, None


def permute(x_TH: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """:func:`permute_reference` in one launch, and one backward; at least one token and one row."""
    return _Permute.apply(x_TH.contiguous(), *row_map)


def unpermute(y_RH: torch.Tensor, gate_TK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """:func:`unpermute_reference` in one launch, and one backward; gates are fp32; at least one token and one row."""
    return _Unpermute.apply(y_RH.contiguous(), gate_TK.contiguous(), *row_map)
