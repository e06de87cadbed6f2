"""The experts' feed-forwards, gelu(x @ w1 + b1) @ w2 + b2, with everything between the products in single passes.

    forward     pre = x @ w1    h = gelu(pre + b1)    y = h @ w2, to which b2 is added where y is put in the order of x
    kept        x, pre
    backward    dy is put in the order of the products and d_b2 summed up in one pass
                dh = dy @ w2^T    h again, d_pre and d_b1 in one pass
                d_w2 = h^T @ dy   d_w1 = x^T @ d_pre   dx = d_pre @ w1^T

Rows are equally many for each expert, then products are batches of cuBLAS; or sorted by expert, then they are torch's
grouped products, which learn on the device where an expert's rows end. Neither waits for the host. Sums over rows are
sums over tiles (:mod:`megatron.moe.kernels.tiles`), so nothing is added atomically.

Shapes: L experts, G processes that sent rows, c rows from each of them for an expert, R rows (of each expert, or of
all), H hidden, F FFN hidden.
"""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron.moe.kernels.gelu import bias_gelu, bias_gelu_again
from megatron.moe.kernels.jit import jit
from megatron.moe.kernels.tiles import COLUMNS, ROWS, Table, add_up, grid, new_sums, table, tile, tile_number


@jit
def _move(
    in_ptr, bias_ptr, out_ptr, sums_ptr, tiles_ptr, R, c, H, in_L, in_G, in_c, out_L, out_G, out_c,
    BR: tl.constexpr, BH: tl.constexpr, ADD: tl.constexpr, STORE: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """out = in + bias of the expert (ADD), or out = in and a tile's sum over its rows; out is written with STORE only.

    Row g * c + i of expert l begins at l * in_L + g * in_G + i * in_c; sorted rows one after another.
    """
    expert, row, there, h = tile(tiles_ptr, R, H, BR, BH, SORTED)
    inside = there[:, None] & (h < H)[None, :]
    if SORTED:
        in_row, out_row = row * H, row * H
    else:
        own = row - expert.to(tl.int64) * R
        in_row = expert.to(tl.int64) * in_L + own // c * in_G + own % c * in_c
        out_row = expert.to(tl.int64) * out_L + own // c * out_G + own % c * out_c
    value = tl.load(in_ptr + in_row[:, None] + h[None, :], mask=inside, other=0.0)
    if ADD:
        bias = tl.load(bias_ptr + expert * H + h, mask=h < H, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + bias[None, :]).to(out_ptr.dtype.element_ty)
    else:
        tl.store(sums_ptr + tile_number(H, BH) * H + h, tl.sum(value.to(tl.float32), axis=0), mask=h < H)
    if STORE:
        tl.store(out_ptr + out_row[:, None] + h[None, :], value, mask=inside)


class EqualRows:
    """Equally many rows for each expert, [L, G, c, H] in any order in memory."""

    table: Table | None = None

    def __init__(self, shape: torch.Size) -> None:
        self._L, self._G, self._c, _ = shape

    def matmul(self, x_LRA: torch.Tensor, w_LAB: torch.Tensor) -> torch.Tensor:
        """Each expert's rows times its matrix, [L, R, B]."""
        return torch.bmm(x_LRA, w_LAB)

    def outer_sum(self, x_LRA: torch.Tensor, y_LRB: torch.Tensor) -> torch.Tensor:
        """The sum over an expert's rows of their outer products, [L, A, B]."""
        return torch.bmm(x_LRA.mT, y_LRB)

    def arrange(self, x_LGcH: torch.Tensor) -> torch.Tensor:
        """[L, R, H], contiguous."""
        return x_LGcH.reshape(self._L, self._G * self._c, x_LGcH.size(-1)).contiguous()

    def finish(self, y_LRH: torch.Tensor, bias_LH: torch.Tensor) -> torch.Tensor:
        """y + bias as [L, G, c, H]. In memory it is [G, L, c, H], the order in which rows are sent; may overwrite y."""
        y_LGcH = y_LRH.view(self._L, self._G, self._c, -1)
        out_LGcH = y_LGcH
        if self._G > 1 and self._L > 1:
            out_LGcH = y_LRH.new_empty(self._G, self._L, self._c, y_LRH.size(-1)).transpose(0, 1)
        self._move(y_LGcH, bias_LH, out_LGcH, y_LRH, add=True, store=True)
        return out_LGcH

    def begin_backward(self, dy_LGcH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient as [L, R, H], and its sums over rows, fp32 [L, H]."""
        dy_LGcH = dy_LGcH if dy_LGcH.stride(-1) == 1 else dy_LGcH.contiguous()
        as_it_is = dy_LGcH.is_contiguous()
        out_LGcH = dy_LGcH if as_it_is else torch.empty_like(dy_LGcH, memory_format=torch.contiguous_format)
        out_LRH = out_LGcH.view(self._L, self._G * self._c, -1)
        sums = new_sums(out_LRH, None)
        self._move(dy_LGcH, dy_LGcH, out_LGcH, sums, add=False, store=not as_it_is)
        return out_LRH, add_up(sums, None)

    def end_backward(self, dx_LRH: torch.Tensor) -> torch.Tensor:
        """The gradient as [L, G, c, H]."""
        return dx_LRH.view(self._L, self._G, self._c, -1)

    def _move(
        self, x: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, *, add: bool, store: bool
    ) -> None:
        R, H = self._G * self._c, x.size(-1)
        _move[grid(torch.Size((self._L, R, H)), None)](
            x, bias, out, sums, x, R, self._c, H, *x.stride()[:3], *out.stride()[:3], ROWS, COLUMNS, add, store, False
        )


class SortedRows:
    """Rows sorted by expert, [R, H]."""

    def __init__(self, counts_L: torch.Tensor, rows: int) -> None:
        self.table: Table = table(counts_L, rows)
        self._ends_L = self.table.ends_L

    def matmul(self, x_RA: torch.Tensor, w_LAB: torch.Tensor) -> torch.Tensor:
        """Each row times its expert's matrix, [R, B]."""
        return F.grouped_mm(x_RA, w_LAB, offs=self._ends_L)

    def outer_sum(self, x_RA: torch.Tensor, y_RB: torch.Tensor) -> torch.Tensor:
        """The sum over an expert's rows of their outer products, [L, A, B]; 0 without rows."""
        return F.grouped_mm(x_RA.T, y_RB, offs=self._ends_L)

    def arrange(self, x_RH: torch.Tensor) -> torch.Tensor:
        """As it is, contiguous."""
        return x_RH.contiguous()

    def finish(self, y_RH: torch.Tensor, bias_LH: torch.Tensor) -> torch.Tensor:
        """y + bias of each row's expert, written over y."""
        self._move(y_RH, bias_LH, y_RH, add=True)
        return y_RH

    def begin_backward(self, dy_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient, contiguous, and its sums over each expert's rows, fp32 [L, H]."""
        dy_RH = dy_RH.contiguous()
        sums = new_sums(dy_RH, self.table)
        self._move(dy_RH, dy_RH, sums, add=False)
        return dy_RH, add_up(sums, self.table)

    def end_backward(self, dx_RH: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return dx_RH

    def _move(self, x: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
        R, H = x.shape
        _move[grid(x.shape, self.table)](
            x, bias, out, out, self.table.tiles, R, 1, H, 0, 0, 0, 0, 0, 0, ROWS, COLUMNS, add, add, True
        )


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1_LHF, b1_LF, w2_LFH, b2_LH, layout):
        x = layout.arrange(x)
        pre = layout.matmul(x, w1_LHF)
        y = layout.matmul(bias_gelu(pre, b1_LF, table=layout.table), w2_LFH)
        ctx.save_for_backward(x, pre, w1_LHF, b1_LF, w2_LFH)
        ctx.layout, ctx.b2_dtype = layout, b2_LH.dtype
        return layout.finish(y, b2_LH)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, w1_LHF, b1_LF, w2_LFH = ctx.saved_tensors
        layout = ctx.layout
        dy, d_b2_LH = layout.begin_backward(dy)
        d_pre = layout.matmul(dy, w2_LFH.mT)  # dh at first
        h, d_b1_LF = bias_gelu_again(pre, b1_LF, d_pre, layout.table)
        d_w2_LFH = layout.outer_sum(h, dy)
        del h, dy
        d_w1_LHF = layout.outer_sum(x, d_pre)
        dx = layout.end_backward(layout.matmul(d_pre, w1_LHF.mT))
        return dx, d_w1_LHF, d_b1_LF.to(b1_LF.dtype), d_w2_LFH, d_b2_LH.to(ctx.b2_dtype), None


Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def expert_mlp(x_LGcH: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Expert outputs [L, G, c, H] for equally many rows for each expert.

    Args:
        x_LGcH: at least one row, in the number format of the weights, in any order in memory.
        weights: w1 [L, H, F], b1 [L, F], w2 [L, F, H], b2 [L, H]; contiguous.
    """
    return _ExpertMLP.apply(x_LGcH, *weights, EqualRows(x_LGcH.shape))


def expert_mlp_sorted(x_RH: torch.Tensor, weights: Weights, counts_L: torch.Tensor) -> torch.Tensor:
    """Expert outputs [R, H] for rows sorted by expert, at least one, of which expert i has ``counts_L[i]``.

    Args:
        x_RH, weights: as for :func:`expert_mlp`.
        counts_L: integers on the device, at most 1 024; their sum is R.
    """
    return _ExpertMLP.apply(x_RH, *weights, SortedRows(counts_L, x_RH.size(0)))
