"""Slots in the experts' buffers: each expert's tokens, counted in an order that may be random, without a sort.

Two kernels over blocks of the order: one counts the tokens of each expert in a block, the other adds up the counts of
the blocks before and numbers a block's own tokens. A random order is a keyed bijection of the tokens' numbers.

Shapes: T tokens, E experts, C capacity, R rows of all buffers, B tokens of a block.
"""

import triton.language as tl

from megatron.moe.kernels.jit import jit


@jit
def mix(x, key):
    """A 32-bit hash of x and key (murmur3's finalizer)."""
    x = (x ^ key).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def _shuffle(i, low, high, seed):
    """A random bijection of [0, 2^(low + high)): six Feistel rounds over numbers of ``low`` and ``high`` bits."""
    for turn in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]  (Triton types it for its compiler only)
        a = i >> low
        b = i & ((1 << low) - 1)
        a = a ^ (mix(b, (seed >> (8 * turn)).to(tl.uint32) + 2 * turn).to(tl.int64) & ((1 << high) - 1))
        b = b ^ (mix(a, (seed >> (8 * turn + 4)).to(tl.uint32) + 2 * turn + 1).to(tl.int64) & ((1 << low) - 1))
        i = (a << low) | b
    return i


@jit
def _token_in_order(i, T, low, high, seed_ptr, RANDOM: tl.constexpr):
    """The i-th token in the order in which slots are given."""
    token = i.to(tl.int64)
    if RANDOM:
        seed = tl.load(seed_ptr)
        token = _shuffle(tl.where(i < T, token, 0), low, high, seed)
        outside = token >= T
        while tl.max(outside.to(tl.int32), axis=0) > 0:  # walk along the bijection's cycle until inside
            token = tl.where(outside, _shuffle(token, low, high, seed), token)
            outside = token >= T
    return token


@jit
def count_by_block(
    expert_ptr, count_ptr, token_ptr, seed_ptr, T, E, R, low, high, blocks,
    B: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Count the tokens of each expert in a block of the order; and mark a range of the buffers' rows as empty."""
    block = tl.program_id(0)
    e = tl.arange(0, BE)
    counts = tl.zeros((BE,), dtype=tl.int32)
    for start in tl.static_range(0, B, CHUNK):
        i = block * B + start + tl.arange(0, CHUNK)
        token = _token_in_order(i, T, low, high, seed_ptr, RANDOM)
        expert = tl.load(expert_ptr + token, mask=i < T, other=-1)
        counts += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * BE + e, counts)
    length = tl.cdiv(R, blocks)
    for start in range(0, length, B):
        at = start + tl.arange(0, B)
        row = block * length + at
        tl.store(token_ptr + row, tl.full((B,), -1, tl.int32), mask=(at < length) & (row < R))


@jit
def assign_slots(
    expert_ptr, gate_ptr, slot_ptr, row_ptr, token_ptr, count_ptr, p_sum_ptr, z_sum_ptr, share_ptr, counts_ptr,
    losses_ptr, seed_ptr, T, E, C, low, high, blocks, gate_blocks,
    B: tl.constexpr, BE: tl.constexpr, RANDOM: tl.constexpr, DROP: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Give a block's tokens their slots; the program after the last block sums up losses and counts."""
    block = tl.program_id(0)
    e = tl.arange(0, BE)
    before = tl.zeros((BE,), dtype=tl.int32)  # tokens of each expert in earlier blocks
    for b in range(0, block if DROP else blocks):
        counts = tl.load(count_ptr + b * BE + e)
        before += counts if DROP or block == blocks else tl.where(b < block, counts, 0)
    if block == blocks:
        p_sum = tl.zeros((BE,), dtype=tl.float32)
        z_sum = 0.0
        for b in range(0, gate_blocks):
            p_sum += tl.load(p_sum_ptr + b * BE + e)
            z_sum += tl.load(z_sum_ptr + b)
        tokens = tl.maximum(T, 1).to(tl.float32)
        tl.store(counts_ptr + e, before.to(tl.int64), mask=e < E)
        tl.store(counts_ptr + E, tl.sum(tl.maximum(before - C, 0), axis=0).to(tl.int64) if DROP else 0)
        share = tl.load(share_ptr + e, mask=e < E, other=0.0) if SHARES else before.to(tl.float32) / tokens
        tl.store(losses_ptr, tl.sum(p_sum / tokens * share, axis=0) * E)
        tl.store(losses_ptr + 1, z_sum / tokens)
    else:
        first = tl.zeros((BE,), dtype=tl.int32)  # row at which each expert's tokens begin
        if DROP:
            first += e * C
        else:
            total = tl.zeros((BE,), dtype=tl.int32)
            for b in range(0, blocks):
                total += tl.load(count_ptr + b * BE + e)
            first += tl.cumsum(total, axis=0) - total
        i = block * B + tl.arange(0, B)
        token = _token_in_order(i, T, low, high, seed_ptr, RANDOM)
        expert = tl.load(expert_ptr + token, mask=i < T, other=-1)
        earlier = (expert[:, None] == expert[None, :]) & (tl.arange(0, B)[None, :] < tl.arange(0, B)[:, None])
        mine = expert[:, None] == e[None, :]
        slot = tl.sum(earlier.to(tl.int32), axis=1) + tl.sum(tl.where(mine, before[None, :], 0), axis=1)
        row = slot + tl.sum(tl.where(mine, first[None, :], 0), axis=1)
        tl.store(slot_ptr + token, slot, mask=i < T)
        if DROP:
            tl.store(gate_ptr + token, tl.zeros((B,), tl.float32), mask=(i < T) & (slot >= C))
        kept = (i < T) & ((slot < C) | (not DROP))
        tl.store(row_ptr + token, tl.where(kept, row, -1), mask=i < T)
        tl.store(token_ptr + row, token.to(tl.int32), mask=kept)


def block_size(BE: int) -> int:
    """Tokens of a block of the order."""
    return min(256, max(16, 32768 // BE))
