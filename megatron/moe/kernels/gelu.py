"""GELU (tanh form) of an expert's first product plus its bias, with or without the gate of the row; and backward.

With a gate both the product and its activation are kept. The backward pass computes the activation again in registers
and gets two more things for nothing: the gradient of each row's gate, which is dh . h, and the first bias's gradient.
Without one only the product is kept, and the backward pass also writes the activation again, which the second weight's
gradient needs.

Shapes: L experts, C rows of each expert's buffer, R rows of all (sorted by expert), F FFN hidden.
"""

import torch
import torch.nn.functional as F
import triton.language as tl

from megatron.moe.kernels.jit import cdiv, jit
from megatron.moe.kernels.tiles import COLUMNS, ROWS, Table, add_up, grid, new_sums, tile, tile_number


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


@jit
def _gelu(x):
    """gelu(x) = x * s with s = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3); and its derivative."""
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    s = 1.0 / (1.0 + tl.exp(-2.0 * u))
    slope = s + 2.0 * x * s * (1.0 - s) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return x * s, slope


@jit
def _forward(
    pre_ptr, bias_ptr, gate_ptr, out_ptr, tiles_ptr, C, F,
    BR: tl.constexpr, BF: tl.constexpr, GATED: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    expert, row, there, f = tile(tiles_ptr, C, F, BR, BF, SORTED)
    inside = there[:, None] & (f < F)[None, :]
    at = row[:, None] * F + f[None, :]
    bias = tl.load(bias_ptr + expert * F + f, mask=f < F, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    h, _ = _gelu(pre)
    if GATED:
        gate = tl.load(gate_ptr + row, mask=there, other=0.0)
        h *= gate[:, None]
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    pre_ptr, bias_ptr, dh_ptr, gate_ptr, h_ptr, bias_sum_ptr, dot_ptr, tiles_ptr, C, F,
    BR: tl.constexpr, BF: tl.constexpr, GATED: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Writes the product's gradient over dh, a tile's sum over its rows, and dh . h or without a gate h."""
    expert, row, there, f = tile(tiles_ptr, C, F, BR, BF, SORTED)
    inside = there[:, None] & (f < F)[None, :]
    at = row[:, None] * F + f[None, :]
    bias = tl.load(bias_ptr + expert * F + f, mask=f < F, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h, slope = _gelu(pre)
    d_pre = dh * slope
    if GATED:
        gate = tl.load(gate_ptr + row, mask=there, other=0.0)
        d_pre *= gate[:, None]
        dot = tl.sum(dh * h, axis=1)
        columns = tl.cdiv(F, BF)
        tl.store(dot_ptr + row * (columns + 1) + tl.program_id(0) % columns + 1, dot, mask=there)
    else:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_ptr + at, d_pre.to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(bias_sum_ptr + tile_number(F, BF) * F + f, tl.sum(d_pre, axis=0), mask=f < F)


def bias_gelu(
    pre: torch.Tensor, bias_LF: torch.Tensor, gate_LC: torch.Tensor | None = None, table: Table | None = None
) -> torch.Tensor:
    """:func:`reference` in one launch, of ``pre`` [L, C, F]; with a ``table`` of sorted rows [R, F]."""
    out = torch.empty_like(pre)
    if pre.numel():
        tiles = pre if table is None else table.tiles
        gated = gate_LC is not None
        _forward[grid(pre.shape, table)](
            pre, bias_LF, gate_LC if gated else pre, out, tiles, pre.size(-2), pre.size(-1),
            ROWS, COLUMNS, gated, table is not None,
        )  # fmt: skip
    return out


def dot_parts(ffn_size: int) -> int:
    """Parts in which :func:`bias_gelu_backward` gives dh . h, and one before them that it leaves alone."""
    return 1 + cdiv(ffn_size, COLUMNS)


def bias_gelu_backward(
    pre_LCF: torch.Tensor, bias_LF: torch.Tensor, dh_LCF: torch.Tensor, gate_LC: torch.Tensor, dot: torch.Tensor
) -> torch.Tensor:
    """:func:`backward_reference`: the gradient is written over ``dh_LCF``, dh . h in parts into ``dot`` [L * C, parts].

    Returns:
        The bias's gradient, fp32 [L, F].
    """
    bias_sum = new_sums(pre_LCF, None)
    if pre_LCF.numel():
        _, C, F = pre_LCF.shape
        _backward[grid(pre_LCF.shape, None)](
            pre_LCF, bias_LF, dh_LCF, gate_LC, pre_LCF, bias_sum, dot, pre_LCF, C, F, ROWS, COLUMNS, True, False
        )
    return add_up(bias_sum, None)


def bias_gelu_again(
    pre: torch.Tensor, bias_LF: torch.Tensor, dh: torch.Tensor, table: Table | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`backward_reference` without gates: the product's gradient is written over ``dh``.

    Args:
        pre: the first product, [L, C, F]; with a ``table`` of sorted rows, at least one, [R, F].
        dh: the activation's gradient, contiguous as ``pre``.

    Returns:
        The activation gelu(pre + bias), and the bias's gradient, fp32 [L, F].
    """
    h, bias_sum = torch.empty_like(pre), new_sums(pre, table)
    if pre.numel():
        tiles = pre if table is None else table.tiles
        _backward[grid(pre.shape, table)](
            pre, bias_LF, dh, pre, h, bias_sum, pre, tiles, pre.size(-2), pre.size(-1),
            ROWS, COLUMNS, False, table is not None,
        )  # fmt: skip
    return h, add_up(bias_sum, table)
