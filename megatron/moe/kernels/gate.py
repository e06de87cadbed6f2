"""The top-1 router in three launches forward and two backward.

    forward    gate kernel       x, weight -> expert, gate, logsumexp of each token; sums over each block of tokens
               count kernel      tokens of each expert in each block, in the order in which slots are given
               slots kernel      slot of each token, token of each slot; counts, aux loss and z-loss
    backward   gate kernel       logits again, their gradient, and the input's; the weight's is one matrix product

No [T, E] tensor is in memory forward; backward has the gradient of the logits, for the matrix product. Nothing is added
atomically, so results are deterministic, and the host waits for nothing.

Shapes: T tokens, H hidden, E experts, C capacity, R rows of all buffers, B tokens of a block.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron.moe.balancing import BIN_WIDTH, BINS, FINEST
from megatron.moe.kernels.jit import cdiv, jit, next_power_of_2
from megatron.moe.kernels.slots import assign_slots, block_size, count_by_block


class Gating(NamedTuple):
    """What the router decides. The first three carry gradients."""

    gate_T: torch.Tensor  # fp32; 0 for a dropped token
    aux_loss: torch.Tensor  # fp32 scalar
    z_loss: torch.Tensor  # fp32 scalar
    expert_T: torch.Tensor  # int32
    slot_T: torch.Tensor  # int32, position among the tokens of the expert; ``capacity`` or more: dropped
    row_T: torch.Tensor  # int32, row in the buffers of all experts, or -1
    counts_E: torch.Tensor  # int64, tokens of each expert before dropping
    dropped: torch.Tensor  # int64 scalar, dropped tokens
    token_R: torch.Tensor  # int32 [E * C], or [T] without a capacity: the token in each row of the buffers, or -1


class Balance(NamedTuple):
    """What the router has learned outside of gradient descent, and learns; see :mod:`megatron.moe.balancing`."""

    bias_E: torch.Tensor | None = None  # fp32, added to the logits for the choice
    share_E: torch.Tensor | None = None  # fp32, loads for the aux loss in place of the micro-batch's
    histogram_REB: torch.Tensor | None = None  # int32, of which each gets a part of this micro-batch added
    mean_H: torch.Tensor | None = None  # fp32, subtracted from each token for the logits
    input_sum: torch.Tensor | None = None  # float64 [1, H + 1], to which the tokens and their number are added


NO_BALANCE = Balance()


def reference(
    x_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    capacity: int | None,
    order_T: torch.Tensor | None = None,
    balance: Balance = NO_BALANCE,
) -> Gating:
    """What the kernels compute, in plain torch and in the precision of the inputs.

    Args:
        capacity: rows of each expert's buffer; None for as many as needed.
        order_T: a permutation of the tokens; slots are given in this order (by default in that of the tokens).
        balance: its histogram and its sum stay as they are.
    """
    T, E = x_TH.size(0), weight_EH.size(0)
    logits_TE = (x_TH if balance.mean_H is None else x_TH - balance.mean_H) @ weight_EH.T
    p_TE = logits_TE.softmax(-1)
    expert_T = (logits_TE if balance.bias_E is None else logits_TE + balance.bias_E).argmax(-1)
    gate_T = p_TE.gather(1, expert_T[:, None])[:, 0]
    counts_E = torch.bincount(expert_T, minlength=E)
    order_T = torch.arange(T, device=x_TH.device) if order_T is None else order_T
    in_order_T = expert_T[order_T]
    before_T = torch.nn.functional.one_hot(in_order_T, E).cumsum(0).gather(1, in_order_T[:, None])[:, 0] - 1
    slot_T = torch.empty_like(expert_T)
    slot_T[order_T] = before_T
    if capacity is None:
        row_T = (counts_E.cumsum(0) - counts_E)[expert_T] + slot_T
        token_R = torch.full((T,), -1, dtype=torch.int32, device=x_TH.device)
        kept_T = torch.ones_like(slot_T, dtype=torch.bool)
    else:
        kept_T = slot_T < capacity
        row_T = expert_T * capacity + slot_T
        token_R = torch.full((E * capacity,), -1, dtype=torch.int32, device=x_TH.device)
    share_E = counts_E / max(T, 1) if balance.share_E is None else balance.share_E
    token_R[row_T[kept_T]] = torch.arange(T, dtype=torch.int32, device=x_TH.device)[kept_T]
    return Gating(
        gate_T=gate_T.masked_fill(~kept_T, 0.0),
        aux_loss=E * (p_TE.sum(0) / max(T, 1) * share_E).sum(),
        z_loss=logits_TE.logsumexp(-1).square().sum() / max(T, 1),
        expert_T=expert_T.int(),
        slot_T=slot_T.int(),
        row_T=row_T.where(kept_T, -1).int(),
        counts_E=counts_E,
        dropped=(~kept_T).sum(),
        token_R=token_R,
    )


@jit
def _logits(
    x_ptr, w_ptr, offset_ptr, sum_ptr, row, T, H, E,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, IEEE: tl.constexpr, OFFSET: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """fp32 [BT, BE] of the tokens ``row``; -inf beyond E. Products of half-precision numbers are exact in fp32.

    With SUM, the sum of these tokens, [H], is stored.
    """
    e = tl.arange(0, BE)
    k = tl.arange(0, BK)
    x_at = x_ptr + row.to(tl.int64)[:, None] * H + k[None, :]
    w_at = w_ptr + e[None, :] * H + k[:, None]
    acc = tl.zeros((BT, BE), dtype=tl.float32)
    for start in range(0, H, BK):
        inside = k < H - start
        x = tl.load(x_at + start, mask=(row < T)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at + start, mask=(e < E)[None, :] & inside[:, None], other=0.0)
        if IEEE:  # noqa: SIM108
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc)
        if SUM:
            tl.store(sum_ptr + start + k, tl.sum(x.to(tl.float32), axis=0), mask=inside)
    if OFFSET:
        acc -= tl.load(offset_ptr + e, mask=e < E, other=0.0)[None, :]
    return tl.where((e < E)[None, :], acc, float("-inf"))


@jit
def _gate_forward(
    x_ptr, w_ptr, offset_ptr, bias_ptr, expert_ptr, gate_ptr, lse_ptr, p_sum_ptr, z_sum_ptr, x_sum_ptr, histogram_ptr,
    T, H, E, copies, finest, width,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, IEEE: tl.constexpr, OFFSET: tl.constexpr,
    SUM: tl.constexpr, BIAS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """With BIAS, experts are chosen by logit + bias. With BINS above 0, count what scores lack of thresholds."""
    block = tl.program_id(0)
    row = block * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    x_sum = x_sum_ptr + block * (H + 1)
    logits = _logits(x_ptr, w_ptr, offset_ptr, x_sum, row, T, H, E, BT, BE, BK, IEEE, OFFSET, SUM)
    most = tl.max(logits, axis=1)
    p = tl.exp(logits - most[:, None])
    total = tl.sum(p, axis=1)
    lse = most + tl.log(total)
    scores, best = logits, most
    if BIAS:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
        best = tl.max(scores, axis=1)
    expert = tl.min(tl.where(scores == best[:, None], e[None, :], BE), axis=1)  # of equal ones the first
    expert = tl.minimum(expert, E - 1)  # NaN equals nothing; the loss will tell
    chosen = expert[:, None] == e[None, :]
    tl.store(expert_ptr + row, expert, mask=row < T)
    gate = tl.sum(tl.where(chosen, p, 0.0), axis=1) if BIAS else 1.0
    tl.store(gate_ptr + row, gate / total, mask=row < T)
    tl.store(lse_ptr + row, lse, mask=row < T)
    real = (row < T).to(tl.float32)
    tl.store(p_sum_ptr + block * BE + e, tl.sum(p * (real / total)[:, None], axis=0))
    tl.store(z_sum_ptr + block, tl.sum(lse * lse * real, axis=0))
    if SUM:
        tl.store(x_sum + H, tl.sum(real, axis=0))
    if BINS > 0:
        second = tl.max(tl.where(chosen, float("-inf"), scores), axis=1)
        shift = (second[:, None] - scores) / finest
        size = tl.abs(shift)
        asinh = tl.log(size + tl.sqrt(size * size + 1.0))
        at = tl.where(shift < 0, -asinh, asinh) / width + BINS / 2
        at = tl.where(at == at, tl.minimum(tl.maximum(at, 0.0), BINS - 1.0), 0.0)
        inside = (row < T)[:, None] & (e < E)[None, :]
        row_of_bins = block % copies * E + e
        tl.atomic_add(histogram_ptr + row_of_bins[None, :] * BINS + at.to(tl.int32), 1, mask=inside, sem="relaxed")


@jit
def _gate_backward(
    x_ptr, w_ptr, offset_ptr, expert_ptr, lse_ptr, row_ptr, load_ptr, d_gate_ptr, d_losses_ptr, d_logits_ptr,
    from_ptr, dx_ptr, T, H, E, parts,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, IEEE: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, SHARES: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dx = d_logits @ w, plus what ``from`` has of the token if ADD.

    ``load`` is each expert's number of tokens or, with SHARES, its share of them for the aux loss.
    With ROWS, ``from`` [R, H] and ``d_gate`` [R, parts] are by row of the experts' buffers; otherwise [T, H] and [T].
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    logits = _logits(x_ptr, w_ptr, offset_ptr, x_ptr, row, T, H, E, BT, BE, BK, IEEE, OFFSET, False)
    lse = tl.load(lse_ptr + row, mask=row < T, other=0.0)
    p = tl.exp(logits - lse[:, None])
    tokens = tl.maximum(T, 1).to(tl.float32)
    share = tl.load(load_ptr + e, mask=e < E, other=0).to(tl.float32)
    if not SHARES:
        share /= tokens
    d_aux, d_z = tl.load(d_losses_ptr), tl.load(d_losses_ptr + 1)
    expert = tl.load(expert_ptr + row, mask=row < T, other=-1)
    buffer_row = tl.load(row_ptr + row, mask=row < T, other=-1)
    kept = buffer_row >= 0
    if ROWS:
        part = tl.arange(0, BP)
        at = buffer_row.to(tl.int64)[:, None] * parts + part[None, :]
        d_gate = tl.sum(tl.load(d_gate_ptr + at, mask=kept[:, None] & (part < parts)[None, :], other=0.0), axis=1)
        from_row = buffer_row.to(tl.int64)
    else:
        d_gate = tl.load(d_gate_ptr + row, mask=kept, other=0.0).to(tl.float32)
        from_row = row.to(tl.int64)
    dp = tl.where(expert[:, None] == e[None, :], d_gate[:, None], 0.0) + (d_aux * E / tokens * share)[None, :]
    d_logits = p * (dp - tl.sum(dp * p, axis=1)[:, None] + (d_z * 2.0 * lse / tokens)[:, None])
    d_logits = tl.where((row < T)[:, None], d_logits, 0.0)
    stored = d_logits.to(d_logits_ptr.dtype.element_ty)
    tl.store(
        d_logits_ptr + row.to(tl.int64)[:, None] * E + e[None, :], stored, mask=(row < T)[:, None] & (e < E)[None, :]
    )
    k = tl.arange(0, BK)
    dx_at = dx_ptr + row.to(tl.int64)[:, None] * H + k[None, :]
    w_at = w_ptr + e[:, None] * H + k[None, :]
    for start in range(0, H, BK):
        inside = k < H - start
        where = (row < T)[:, None] & inside[None, :]
        w = tl.load(w_at + start, mask=(e < E)[:, None] & inside[None, :], other=0.0)
        if IEEE:  # noqa: SIM108
            dx = tl.dot(d_logits, w.to(tl.float32), input_precision="ieee")
        else:
            dx = tl.dot(stored, w)
        if ADD:
            other = where & kept[:, None] if ROWS else where
            dx += tl.load(from_ptr + from_row[:, None] * H + k[None, :] + start, mask=other, other=0.0).to(tl.float32)
        tl.store(dx_at + start, dx.to(dx_ptr.dtype.element_ty), mask=where)


class _Tile(NamedTuple):
    """How the gate kernels cut their work."""

    BT: int  # tokens of a block
    BE: int  # experts, rounded up
    BK: int  # columns of H at a time
    warps: int
    stages: int  # of the loop over columns: so many blocks of them are in shared memory at once


def _tile(E: int, itemsize: int, shared: int) -> _Tile | None:
    """The largest cut whose blocks fit into ``shared`` bytes, or None.

    Logits fill the registers at most half. At most, the backward kernel has in shared memory the gradient of a block's
    logits, and for each stage a block of the router's weight and one of the tokens.
    """
    BE = max(16, next_power_of_2(E))
    BT, warps = (64, 4) if BE <= 128 else (max(16, 16384 // BE), 8)
    BK = 64 if BE * itemsize <= 512 else 32
    for columns, stages in ((BK, 3), (BK, 2), (BK, 1), (16, 1)):
        if (BT * BE + stages * columns * (BT + BE)) * itemsize <= shared:
            return _Tile(BT, BE, columns, warps, stages)
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a kernel can have; without limit in Triton's interpreter."""
    if device.type != "cuda":
        return sys.maxsize
    utils = triton.runtime.driver.active.utils  # pyright: ignore[reportAttributeAccessIssue]  (of each backend's driver)
    return utils.get_device_properties(device.index)["max_shared_mem"]


def _tile_for(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> _Tile | None:
    itemsize = 4 if _ieee(x_TH, weight_EH) else x_TH.element_size()
    return _tile(weight_EH.size(0), itemsize, _shared_memory(x_TH.device))


def fits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> bool:
    """Whether the device has the shared memory that the kernels need for so many experts in this number format."""
    return _tile_for(x_TH, weight_EH) is not None


def _tile_that_fits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> _Tile:
    tile = _tile_for(x_TH, weight_EH)
    if tile is None:
        raise ValueError(
            f"a router of {weight_EH.size(0)} experts for {x_TH.dtype} tokens needs more shared memory than the "
            f"{_shared_memory(x_TH.device)} bytes of {x_TH.device}; use plain torch where fits() says no"
        )
    return tile


Agree = Callable[[torch.Tensor], object]


class Decided(NamedTuple):
    """What :func:`launch_forward` computes: the public part, and what the backward pass needs of it."""

    gating: Gating
    kept: tuple[torch.Tensor | None, ...]  # for launch_backward


def launch_forward(
    x_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    capacity: int | None,
    random: bool,
    agree: Agree | None = None,
    balance: Balance = NO_BALANCE,
) -> Decided:
    """The forward kernels; see :func:`gate`."""
    T, H = x_TH.shape
    E = weight_EH.size(0)
    BT, BE, BK, warps, stages = _tile_that_fits(x_TH, weight_EH)
    B = block_size(BE)
    gate_blocks, blocks = cdiv(T, BT), cdiv(T, B)
    R = T if capacity is None else E * capacity
    new = x_TH.new_empty
    expert_T, slot_T, row_T, token_R = (new(size, dtype=torch.int32) for size in (T, T, T, R))
    gate_T, lse_T = (new(T, dtype=torch.float32) for _ in range(2))
    p_sum, z_sum = new((gate_blocks, BE), dtype=torch.float32), new(gate_blocks, dtype=torch.float32)
    count = new((blocks, BE), dtype=torch.int32)
    counts, losses = new(E + 1, dtype=torch.int64), new(2, dtype=torch.float32)
    bits = max(T - 1, 1).bit_length()
    low, high = (bits + 1) // 2, bits // 2
    seed = torch.randint(2**62, (), device=x_TH.device) if random else counts

    def or_any(x: torch.Tensor | None) -> torch.Tensor:
        return lse_T if x is None else x  # any: it is not read

    # (x - mean) @ weight^T is x @ weight^T - weight @ mean
    offset_E = None if balance.mean_H is None else weight_EH.float() @ balance.mean_H
    x_sum = None if balance.input_sum is None else new((gate_blocks, H + 1), dtype=torch.float32)
    copies = 1 if balance.histogram_REB is None else balance.histogram_REB.size(0)
    if T:
        _gate_forward[(gate_blocks,)](
            x_TH, weight_EH, or_any(offset_E), or_any(balance.bias_E), expert_T, gate_T, lse_T, p_sum, z_sum,
            or_any(x_sum), or_any(balance.histogram_REB), T, H, E, copies, FINEST, BIN_WIDTH, BT, BE, BK,
            _ieee(x_TH, weight_EH), offset_E is not None, x_sum is not None, balance.bias_E is not None,
            0 if balance.histogram_REB is None or E == 1 else BINS,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if balance.input_sum is not None and x_sum is not None:
            balance.input_sum.add_(x_sum.sum(0, dtype=torch.float64))
        if agree is not None:
            agree(expert_T)
        count_by_block[(blocks,)](
            expert_T, count, token_R, seed, T, E, R, low, high, blocks,
            B, BE, min(B, max(16, 8192 // BE)), random,
        )  # fmt: skip
    else:
        token_R.fill_(-1)
    assign_slots[(blocks + 1,)](
        expert_T, gate_T, slot_T, row_T, token_R, count, p_sum, z_sum, or_any(balance.share_E), counts, losses, seed,
        T, E, capacity or 0, low, high, blocks, gate_blocks, B, BE, random, capacity is not None,
        balance.share_E is not None,
        num_warps=8,
    )  # fmt: skip
    gating = Gating(gate_T, losses[0], losses[1], expert_T, slot_T, row_T, counts[:E], counts[E], token_R)
    load_E = gating.counts_E if balance.share_E is None else balance.share_E
    return Decided(gating, (expert_T, lse_T, row_T, load_E, offset_E, balance.mean_H))


def launch_backward(
    x_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    kept: Sequence[torch.Tensor | None],
    d_gate: torch.Tensor,
    d_losses: tuple[torch.Tensor | None, torch.Tensor | None],
    dx: torch.Tensor | None,
    by_row: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of tokens and router weights.

    Args:
        kept: of the forward pass.
        d_gate: of each token [T], or ``by_row`` several parts of it for each row of the experts' buffers, [R, parts].
        d_losses: of aux loss and z-loss.
        dx: what else each token's gradient has, [T, H], or ``by_row`` [R, H]; None for nothing.
    """
    expert_T, lse_T, row_T, load_E, offset_E, mean_H = kept
    assert lse_T is not None
    assert load_E is not None
    T, H = x_TH.shape
    E = weight_EH.size(0)
    BT, BE, BK, warps, stages = _tile_that_fits(x_TH, weight_EH)
    ieee = _ieee(x_TH, weight_EH)
    zero = lse_T.new_zeros(())
    losses = torch.stack([zero if d is None else d.float() for d in d_losses])
    parts = d_gate.size(1) if by_row else 1
    dx_TH = torch.empty_like(x_TH) if by_row or dx is None else dx
    d_logits_TE = x_TH.new_empty((T, E), dtype=torch.float32 if ieee else x_TH.dtype)
    if T:
        _gate_backward[(cdiv(T, BT),)](
            x_TH, weight_EH, lse_T if offset_E is None else offset_E, expert_T, lse_T, row_T, load_E, d_gate, losses,
            d_logits_TE, dx_TH if dx is None else dx, dx_TH, T, H, E, parts,
            BT, BE, BK, next_power_of_2(parts), ieee, dx is not None, by_row, load_E.is_floating_point(),
            offset_E is not None,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    d_weight_EH = d_logits_TE.T @ x_TH.to(d_logits_TE.dtype)
    if mean_H is not None:
        d_offset_E = d_logits_TE.sum(0, dtype=torch.float32)
        d_weight_EH = torch.addr(d_weight_EH.float(), d_offset_E, mean_H, alpha=-1)
    return dx_TH, d_weight_EH.to(weight_EH.dtype)


def _ieee(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> bool:
    """Whether products need fp32 arithmetic: those of half-precision numbers are exact on tensor cores."""
    return not (x_TH.dtype == weight_EH.dtype and x_TH.dtype in (torch.bfloat16, torch.float16))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_EH, capacity, random, agree, balance):
        (gate_T, aux_loss, z_loss, *rest), kept = launch_forward(x_TH, weight_EH, capacity, random, agree, balance)
        ctx.save_for_backward(x_TH, weight_EH, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rest)
        return x_TH.view_as(x_TH), gate_T, aux_loss.clone(), z_loss.clone(), *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx_TH, d_gate_T, d_aux, d_z, *_):
        x_TH, weight_EH, *kept = ctx.saved_tensors
        d_gate_T = torch.zeros_like(kept[1]) if d_gate_T is None else d_gate_T.contiguous()
        dx_TH = None if dx_TH is None else dx_TH.clone(memory_format=torch.contiguous_format)
        dx_TH, d_weight_EH = launch_backward(x_TH, weight_EH, kept, d_gate_T, (d_aux, d_z), dx_TH, by_row=False)
        return dx_TH, d_weight_EH, None, None, None, None


def gate(
    x_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    capacity: int | None,
    *,
    random: bool,
    agree: Agree | None = None,
    balance: Balance = NO_BALANCE,
) -> tuple[torch.Tensor, Gating]:
    """Route each token to its best expert.

    Args:
        x_TH: in bf16, fp16 or fp32; contiguous.
        weight_EH: of the router, E at most 1 024; see :func:`fits`.
        capacity: rows of each expert's buffer; None for as many as needed.
        random: an over-full expert keeps a random choice of its tokens instead of the first; drawn by a random order of
            the tokens, which follows from one number of torch's default generator of the device.
        agree: is given each token's expert, int32 [T], before slots follow from them, and may overwrite
            them. Gates stay those of the highest logits, so it is for choices that rounding alone can tell apart.
        balance: see :class:`Balance`.

    Returns:
        ``x_TH`` to go on with (its gradient is then added to the router's where that is computed), and the decisions.
    """
    x_TH, *gating = _Gate.apply(x_TH, weight_EH.contiguous(), capacity, random, agree, balance)
    return x_TH, Gating(*gating)
