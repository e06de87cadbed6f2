"""Tiles of rows sorted by expert, and the sums over them."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.moe.kernels import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = [[40, 0, 32, 1], [0, 0, 0, 500], [7], [0] * 5 + [65, 31] + [0] * 4, [3] * 130]


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} experts")
def test_the_table_covers_every_row_once(counts):
    counts_L, rows = torch.tensor(counts, device=DEVICE), sum(counts)
    found = tiles.table(counts_L, rows)
    for mine, expected in zip(found, tiles.table_reference(counts_L, rows), strict=True):
        assert torch.equal(mine, expected)
    covered = [
        (expert, row)
        for expert, first, end in found.tiles.tolist()
        for row in range(first, min(first + tiles.ROWS, end))
    ]
    assert covered == list(zip([e for e, n in enumerate(counts) for _ in range(n)], range(rows), strict=True))


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} experts")
def test_sums_over_tiles_of_an_expert(counts):
    found = tiles.table(torch.tensor(counts, device=DEVICE), sum(counts))
    sums = torch.randn(found.tiles.size(0), 150, device=DEVICE)
    ends = found.tile_ends_L.tolist()
    pieces = [sums[start:end].double().sum(0) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    torch.testing.assert_close(tiles.add_up(sums, found).double(), torch.stack(pieces), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most_rows", [100_000 * tiles.ROWS, 1])
def test_only_the_first_axis_of_a_grid_is_long(most_rows):
    """CUDA's limit is 65 535 for the others."""
    L, F = 1024, 5 * tiles.COLUMNS + 1
    count = tiles.most_tiles(most_rows, L)
    found = tiles.Table(*(torch.empty(0, device="meta") for _ in range(2)), torch.empty(count, 3, device="meta"))
    assert tiles.grid(torch.Size((most_rows, F)), found) == (count * 6, 1)
    assert tiles.grid(torch.Size((L, most_rows, F)), None) == (-(-most_rows // tiles.ROWS) * 6, L)
