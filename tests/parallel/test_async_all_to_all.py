"""Rows and gradients get to where they should while something else is computed."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.parallel.all_to_all import AllToAllSingle
from megatron.parallel.async_all_to_all import AsyncAllToAll

# SENT[i][j]: rows that rank i sends to rank j.
SENT = [[1, 0, 3], [2, 2, 0], [0, 0, 0]]


def rows(rank: int, count: int) -> torch.Tensor:
    """Row r of a rank is [rank, r]."""
    return torch.stack([torch.full((count,), float(rank)), torch.arange(count, dtype=torch.float32)], dim=1)


def exchange() -> dict:
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    equal = rows(rank, 2 * world_size).requires_grad_()
    received = AsyncAllToAll(equal, [AllToAllSingle(group)]).wait()
    received.backward(received.detach())
    uneven = rows(rank, sum(SENT[rank])).requires_grad_()
    step = AllToAllSingle(group, SENT[rank], [SENT[i][rank] for i in range(world_size)])
    uneven_received = AsyncAllToAll(uneven, [step]).wait()
    # The gradient of a gradient: there, back, and there again.
    (first,) = torch.autograd.grad(uneven_received.pow(3).sum(), uneven, create_graph=True)
    first.sum().backward()
    return {
        "equal": received.detach(),
        "equal gradient": equal.grad,
        "uneven": uneven_received.detach(),
        "first": first.detach(),
        "second": uneven.grad,
        "bf16": AsyncAllToAll(rows(rank, world_size).bfloat16(), [AllToAllSingle(group)]).wait(),
    }


@pytest.mark.distributed
def test_rows_are_received_and_gradients_return():
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


class Noting:
    """A step of one process that writes down when rows are sent."""

    def __init__(self, diary: list[str], word: str) -> None:
        self.diary, self.word = diary, word

    def output_rows(self, rows: int) -> int:
        return rows

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.diary.append(self.word)
        return out.copy_(x)

    def inverse(self) -> "Noting":
        return Noting(self.diary, self.word + "'")


class Square(torch.autograd.Function):
    """x^2, which writes down when it and its gradient are computed."""

    @staticmethod
    def forward(ctx, x, diary, word):
        ctx.save_for_backward(x)
        ctx.diary, ctx.word = diary, word
        diary.append(word)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        ctx.diary.append(ctx.word + "'")
        return 2 * ctx.saved_tensors[0] * grad, None, None


def there_and_back(x: torch.Tensor, diary: list[str]) -> torch.Tensor:
    """x^2 in three chunks, each exchanged there and back; something else is computed meanwhile."""
    there = [AsyncAllToAll(chunk, [Noting(diary, f"there {i}")]) for i, chunk in enumerate(x.chunk(3))]
    beside = Square.apply(x, diary, "beside")
    back = [
        AsyncAllToAll(Square.apply(t.wait(), diary, f"work {i}"), [Noting(diary, f"back {i}")])
        for i, t in enumerate(there)
    ]
    return torch.cat([handle.wait() for handle in back]) + beside


def test_chunks_and_their_gradients_are_sent_before_others_are_computed():
    diary: list[str] = []
    x = torch.arange(6.0, requires_grad=True)
    y = there_and_back(x, diary)
    on_the_way = ["there 0", "there 1", "there 2", "beside"]
    assert diary == [*on_the_way, "work 0", "back 0", "work 1", "back 1", "work 2", "back 2"]
    diary.clear()
    y.sum().backward()
    on_the_way = ["back 2'", "back 1'", "back 0'"]
    assert diary == [*on_the_way, "work 2'", "there 2'", "work 1'", "there 1'", "work 0'", "there 0'", "beside'"]
    assert torch.equal(x.grad, 4 * x.detach())


def test_with_activation_checkpointing_the_gradients_are_sent_first_too():
    x = torch.arange(6.0, requires_grad=True)
    diary: list[str] = []
    there_and_back(x, diary).sum().backward()
    plain, diary = diary, []
    y = torch.utils.checkpoint.checkpoint(there_and_back, x, diary, use_reentrant=False)
    y.sum().backward()
    forward, backward = plain[: plain.index("back 2") + 1], plain[plain.index("back 2") + 1 :]
    recomputed = forward[: forward.index("work 2") + 1]  # the last chunk need not be exchanged again
    assert diary == [*forward, *backward[:4], *recomputed, *backward[4:]]
    assert torch.equal(x.grad, 8 * x.detach())
