"""GELU (tanh form) of an expert's first product plus its bias, times the gate of the row; and the way back.

Both the product and its activation are kept. The way back computes the activation again in registers and gets two more
things for nothing: the gradient of each row's gate, which is dh . h, and the first bias's gradient.

Letters: L experts, C rows of each expert's buffer, F FFN hidden.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 128  # of a tile


def reference(pre_LCF: torch.Tensor, bias_LF: torch.Tensor, gate_LC: torch.Tensor) -> torch.Tensor:
    """gate * gelu(pre + bias)."""
    return F.gelu(pre_LCF + bias_LF[:, None], approximate="tanh") * gate_LC[..., None]


def backward_reference(
    pre_LCF: torch.Tensor, bias_LF: torch.Tensor, dh_LCF: torch.Tensor, gate_LC: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """With h = gelu(pre + bias): the gradient gate * dh * gelu' of the product, its sum over rows, and dh . h."""
    pre = (pre_LCF + bias_LF[:, None]).detach().requires_grad_()
    with torch.enable_grad():
        h = F.gelu(pre, approximate="tanh")
    (d_pre,) = torch.autograd.grad(h, pre, dh_LCF * gate_LC[..., None])
    return d_pre, d_pre.sum(1), (dh_LCF * h.detach()).sum(-1)


@triton.jit
def _gelu(x):
    """gelu(x) = x * s with s = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3); and its derivative."""
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    s = 1.0 / (1.0 + tl.exp(-2.0 * u))
    slope = s + 2.0 * x * s * (1.0 - s) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return x * s, slope


@triton.jit
def _forward(pre_ptr, bias_ptr, gate_ptr, out_ptr, C, F, BR: tl.constexpr, BF: tl.constexpr):
    expert, c, f = _tile(BR, BF)
    inside = (c < C)[:, None] & (f < F)[None, :]
    at = (expert.to(tl.int64) * C + c)[:, None] * F + f[None, :]
    bias = tl.load(bias_ptr + expert * F + f, mask=f < F, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    gate = tl.load(gate_ptr + expert.to(tl.int64) * C + c, mask=c < C, other=0.0)
    h, _ = _gelu(pre)
    h *= gate[:, None]
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(BR: tl.constexpr, BF: tl.constexpr):
    return tl.program_id(2), tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BF + tl.arange(0, BF)


@triton.jit
def _backward(pre_ptr, bias_ptr, dh_ptr, gate_ptr, bias_sum_ptr, dot_ptr, C, F, BR: tl.constexpr, BF: tl.constexpr):
    """Writes the product's gradient over dh, and a tile's sums over rows and columns."""
    expert, c, f = _tile(BR, BF)
    inside = (c < C)[:, None] & (f < F)[None, :]
    row = expert.to(tl.int64) * C + c
    at = row[:, None] * F + f[None, :]
    bias = tl.load(bias_ptr + expert * F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row, mask=c < C, other=0.0)
    pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h, slope = _gelu(pre)
    d_pre = dh * slope * gate[:, None]
    tl.store(dh_ptr + at, d_pre.to(dh_ptr.dtype.element_ty), mask=inside)
    dot = tl.sum(dh * h, axis=1)
    tl.store(dot_ptr + row * (tl.num_programs(0) + 1) + tl.program_id(0) + 1, dot, mask=c < C)
    tile = expert * tl.num_programs(1) + tl.program_id(1)
    tl.store(bias_sum_ptr + tile.to(tl.int64) * F + f, tl.sum(d_pre, axis=0), mask=f < F)


def _grid(pre_LCF: torch.Tensor) -> tuple[int, int, int]:
    L, C, F = pre_LCF.shape
    return triton.cdiv(F, COLUMNS), triton.cdiv(C, ROWS), L


def bias_gelu(pre_LCF: torch.Tensor, bias_LF: torch.Tensor, gate_LC: torch.Tensor) -> torch.Tensor:
    """:func:`reference` in one launch."""
    out_LCF = torch.empty_like(pre_LCF)
    if pre_LCF.numel():
        _, C, F = pre_LCF.shape
        _forward[_grid(pre_LCF)](pre_LCF, bias_LF, gate_LC, out_LCF, C, F, ROWS, COLUMNS)
    return out_LCF


def dot_parts(ffn_size: int) -> int:
    """Parts in which :func:`bias_gelu_backward` gives dh . h, and one before them that it leaves alone."""
    return 1 + triton.cdiv(ffn_size, COLUMNS)


def bias_gelu_backward(
    pre_LCF: torch.Tensor, bias_LF: torch.Tensor, dh_LCF: torch.Tensor, gate_LC: torch.Tensor, dot: torch.Tensor
) -> torch.Tensor:
    """:func:`backward_reference`: the gradient is written over ``dh_LCF``, dh . h in parts into ``dot`` [L * C, parts].

    Returns:
        The bias's gradient, fp32 [L, F].
    """
    L, C, F = pre_LCF.shape
    bias_sum = gate_LC.new_empty(L, triton.cdiv(C, ROWS), F)
    if pre_LCF.numel():
        _backward[_grid(pre_LCF)](pre_LCF, bias_LF, dh_LCF, gate_LC, bias_sum, dot, C, F, ROWS, COLUMNS)
    return bias_sum.sum(1)
