"""Rows to experts and back: gather tokens into buffers, and combine each token's answer.

Every row is written once, so results are deterministic, and each byte is moved once: at b bytes a number, ``gather``
reads and writes about (T + R) H b bytes.

Letters: T tokens, H hidden, R rows of all buffers, L experts.
"""

import torch
import triton
import triton.language as tl


def gather_reference(x_TH: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Row ``index_R[r]`` of ``x_TH`` for each r; zeros where the index is negative. [R, H]"""
    return x_TH[index_R.clamp(min=0).long()].masked_fill((index_R < 0)[:, None], 0.0)


def combine_reference(
    y_RH: torch.Tensor, bias_LH: torch.Tensor, row_T: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor
) -> torch.Tensor:
    """Answer + gate * bias of the expert, of each token; zeros where it has no row (a negative one). [T, H]"""
    biases_TH = bias_LH[expert_T.long()].to(gate_T.dtype) * gate_T[:, None]
    answer_TH = gather_reference(y_RH, row_T).to(gate_T.dtype) + biases_TH
    return answer_TH.masked_fill((row_T < 0)[:, None], 0.0).to(y_RH.dtype)


@triton.jit
def _gather(x_ptr, index_ptr, gate_ptr, out_ptr, gate_R_ptr, H, BH: tl.constexpr):
    row = tl.program_id(0)
    index = tl.load(index_ptr + row)
    readable = tl.where(index >= 0, H, 0)
    tl.store(gate_R_ptr + row, tl.where(index >= 0, tl.load(gate_ptr + tl.maximum(index, 0)), 0.0))
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        x = tl.load(x_ptr + index.to(tl.int64) * H + h, mask=h < readable, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * H + h, x, mask=h < H)


@triton.jit
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


@triton.jit
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
    tl.store(dot_ptr + row * parts, tl.sum(total, axis=0))


def _block(H: int) -> int:
    return min(1024, triton.next_power_of_2(H))


def gather(x_TH: torch.Tensor, index_R: torch.Tensor, gate_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gather_reference` of tokens [R, H] and of their gates [R] in one launch; ``index_R`` is int32."""
    H = x_TH.size(1)
    out_RH, gate_R = x_TH.new_empty(index_R.numel(), H), gate_T.new_empty(index_R.numel())
    if out_RH.numel():
        _gather[(index_R.numel(),)](x_TH, index_R, gate_T, out_RH, gate_R, H, _block(H))
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
    """The way of :func:`combine` back: dy of each row's token, [R, H]; ``dot[:, 0]`` gets its product with the bias."""
    R, H = token_R.numel(), dy_TH.size(1)
    out_RH = dy_TH.new_empty(R, H)
    if R:
        _gather_and_dot[(R,)](dy_TH, bias_LH, token_R, expert_T, out_RH, dot, H, dot.size(1), _block(H))
    return out_RH
