"""How the rows of several experts are cut into tiles, each of one expert only.

    equal    [L, R, H]: as many rows for each expert; a tile's position follows from its number
    sorted   [R, H]: rows sorted by expert, as many as there are; a table made on the device tells a tile's position

The host knows no expert's number of rows, only that T rows in tiles of B take at most T / B + L tiles: those too many
have no rows. A sum over an expert's rows is a sum over its tiles, which another kernel adds up in order.

Shapes: L experts, R rows (of each expert, or of all), F columns.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from megatron.moe.kernels.jit import cdiv, jit, next_power_of_2

ROWS, COLUMNS = 32, 128  # of a tile
_AT_ONCE = 16  # tiles of the table in one program, and tiles added up at once


class Table(NamedTuple):
    """The tiles of sorted rows."""

    ends_L: torch.Tensor  # int32, the row after each expert's last one
    tile_ends_L: torch.Tensor  # int32, the tile after each expert's last one
    tiles: torch.Tensor  # int32 [tiles, 3]: expert, first row, row after the last one


def table_reference(counts_L: torch.Tensor, rows: int) -> Table:
    """:class:`Table` of ``counts_L`` rows for each expert, ``rows`` in all."""
    ends_L = counts_L.cumsum(0)
    tile_ends_L = (-(-counts_L // ROWS)).cumsum(0)
    tiles = []
    for expert, (count, end) in enumerate(zip(counts_L.tolist(), ends_L.tolist(), strict=True)):
        tiles += [(expert, first, end) for first in range(end - count, end, ROWS)]
    tiles += [(0, 0, 0)] * (most_tiles(rows, counts_L.numel()) - len(tiles))
    return Table(ends_L.int(), tile_ends_L.int(), torch.tensor(tiles, dtype=torch.int32, device=counts_L.device))


def most_tiles(rows: int, experts: int) -> int:
    """Tiles that suffice however the rows are shared among the experts."""
    return cdiv(rows, ROWS) + experts


@jit
def _table(
    counts_ptr, ends_ptr, tile_ends_ptr, tiles_ptr, L, tiles, BL: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr
):
    expert = tl.arange(0, BL)
    counts = tl.load(counts_ptr + expert, mask=expert < L, other=0).to(tl.int32)
    ends = tl.cumsum(counts, axis=0)
    needed = (counts + BR - 1) // BR
    tile_ends = tl.cumsum(needed, axis=0)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < L)
        tl.store(tile_ends_ptr + expert, tile_ends, mask=expert < L)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tile_ends - needed
    mine = (tile[:, None] >= first[None, :]) & (tile[:, None] < tile_ends[None, :])  # at most one of each line
    start = ends - counts + (tile[:, None] - first[None, :]) * BR
    at = tiles_ptr + tile * 3
    tl.store(at, tl.sum(tl.where(mine, expert[None, :], 0), axis=1), mask=tile < tiles)
    tl.store(at + 1, tl.sum(tl.where(mine, start, 0), axis=1), mask=tile < tiles)
    tl.store(at + 2, tl.sum(tl.where(mine, ends[None, :], 0), axis=1), mask=tile < tiles)


def table(counts_L: torch.Tensor, rows: int) -> Table:
    """:func:`table_reference` in one launch; ``counts_L`` is on the device, at most 1 024 experts."""
    L = counts_L.numel()
    tiles = most_tiles(rows, L)
    ends_L, tile_ends_L = (counts_L.new_empty(L, dtype=torch.int32) for _ in range(2))
    found = Table(ends_L, tile_ends_L, counts_L.new_empty((tiles, 3), dtype=torch.int32))
    grid = (cdiv(tiles, _AT_ONCE),)
    _table[grid](counts_L, *found, L, tiles, max(16, next_power_of_2(L)), _AT_ONCE, ROWS)
    return found


@jit
def tile(tiles_ptr, R, F, BR: tl.constexpr, BF: tl.constexpr, SORTED: tl.constexpr):
    """This program's expert; its rows, counted over all experts (int64); which of them there are; and its columns.

    Programs of axis 0 go through a tile's columns first, then through the tiles: of an expert, which is the number on
    axis 1, or of all sorted rows. Only axis 0 can be longer than 65 535.
    """
    number = tl.program_id(0) // tl.cdiv(F, BF)
    f = tl.program_id(0) % tl.cdiv(F, BF) * BF + tl.arange(0, BF)
    if SORTED:
        at = tiles_ptr + number * 3
        expert, first, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        row = first + tl.arange(0, BR)
        inside = row < end
        row = row.to(tl.int64)
    else:
        expert = tl.program_id(1)
        c = number * BR + tl.arange(0, BR)
        inside = c < R
        row = expert.to(tl.int64) * R + c
    return expert, row, inside, f


@jit
def tile_number(F, BF: tl.constexpr):
    """Number of this program's tile among those of all experts (int64)."""
    columns = tl.cdiv(F, BF)
    return tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // columns) + tl.program_id(0) // columns


def grid(shape: torch.Size, found: Table | None) -> tuple[int, int]:
    """Programs for rows of a ``shape`` [L, R, F], or with a table [R, F]; see :func:`tile`."""
    columns = cdiv(shape[-1], COLUMNS)
    if found is not None:
        return found.tiles.size(0) * columns, 1
    return cdiv(shape[1], ROWS) * columns, shape[0]


def new_sums(like: torch.Tensor, found: Table | None) -> torch.Tensor:
    """Memory for each tile's sum over its rows, fp32 [tiles, F], or [L, tiles, F]."""
    shape = (found.tiles.size(0),) if found is not None else (like.size(0), cdiv(like.size(1), ROWS))
    return like.new_empty((*shape, like.size(-1)), dtype=torch.float32)


@jit
def _add_up(sums_ptr, tile_ends_ptr, out_ptr, F, BF: tl.constexpr, BT: tl.constexpr):
    expert = tl.program_id(1)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    start = tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(tile_ends_ptr + expert)
    total = tl.zeros((BT, BF), dtype=tl.float32)
    for first in range(start, end, BT):
        t = first + tl.arange(0, BT)
        at = sums_ptr + t.to(tl.int64)[:, None] * F + f[None, :]
        total += tl.load(at, mask=(t < end)[:, None] & (f < F)[None, :], other=0.0)
    tl.store(out_ptr + expert.to(tl.int64) * F + f, tl.sum(total, axis=0), mask=f < F)


def add_up(sums: torch.Tensor, found: Table | None) -> torch.Tensor:
    """Each expert's sum over its tiles, fp32 [L, F]."""
    if found is None:
        return sums.sum(1)
    L, F = found.ends_L.numel(), sums.size(-1)
    out_LF = sums.new_empty(L, F)
    _add_up[(cdiv(F, COLUMNS), L)](sums, found.tile_ends_L, out_LF, F, COLUMNS, _AT_ONCE)
    return out_LF
