"""The all-to-all moves rows where it should, and gradients back."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.parallel.collectives import all_to_all

# SENT[i][j]: rows that rank i sends to rank j.
SENT = [[1, 0, 3], [2, 2, 0], [0, 0, 0]]


def rows(rank: int, count: int) -> torch.Tensor:
    """Row r of a rank is [rank, r]."""
    return torch.stack([torch.full((count,), float(rank)), torch.arange(count, dtype=torch.float32)], dim=1)


def exchange() -> dict:
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    equal = rows(rank, 2 * world_size).requires_grad_()
    received = all_to_all(equal, group)
    received.backward(received.detach())
    uneven = rows(rank, sum(SENT[rank])).requires_grad_()
    splits = [SENT[i][rank] for i in range(world_size)], SENT[rank]
    uneven_received = all_to_all(uneven, group, *splits)
    # The gradient of a gradient: there, back, and there again.
    (first,) = torch.autograd.grad(uneven_received.pow(3).sum(), uneven, create_graph=True)
    first.sum().backward()
    halves = all_to_all(rows(rank, world_size).bfloat16(), group)
    errors = []
    for arguments in (
        (torch.zeros(world_size + 1, 2), group),
        (torch.zeros(3, 2), group, [1, 1, 1], [1, 1, 2]),
        (torch.zeros(3, 2), group, [1, 1, 1], None),
        (torch.zeros(3, 2), None),
    ):
        with pytest.raises(ValueError, match="all_to_all") as error:
            all_to_all(*arguments)
        errors.append(str(error.value))
    return {
        "equal": received.detach(),
        "equal gradient": equal.grad,
        "uneven": uneven_received.detach(),
        "first": first.detach(),
        "second": uneven.grad,
        "bf16": halves,
        "errors": errors,
    }


@pytest.mark.distributed
def test_rows_arrive_and_gradients_return():
    results = run_distributed(exchange, 3)
    for rank, result in enumerate(results):
        assert torch.equal(result["equal"], torch.cat([rows(i, 6)[2 * rank : 2 * rank + 2] for i in range(3)]))
        assert torch.equal(result["equal gradient"], rows(rank, 6))
        arrived = []
        for i in range(3):
            start = sum(SENT[i][:rank])
            arrived.append(rows(i, sum(SENT[i]))[start : start + SENT[i][rank]])
        assert torch.equal(result["uneven"], torch.cat(arrived))
        mine = rows(rank, sum(SENT[rank]))
        assert torch.equal(result["first"], 3 * mine**2)
        assert torch.equal(result["second"], 6 * mine)
        assert torch.equal(result["bf16"].float(), torch.tensor([[float(i), float(rank)] for i in range(3)]))
        assert "4 rows into equal pieces for 3 processes" in result["errors"][0]
        assert "input_splits [1, 1, 2]; they must be 3 numbers whose sum is 3" in result["errors"][1]
        assert "both output_splits and input_splits" in result["errors"][2]
        assert "got None" in result["errors"][3]
