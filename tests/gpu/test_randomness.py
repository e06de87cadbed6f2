"""On a GPU: each tensor-parallel process's own random numbers, and their replay by recomputation."""

import pytest
import torch

from megatron.model.randomness import run_seeded, seed_generators
from megatron.parallel.groups import TensorGroup
from megatron.parallel.randomness import own_randomness
from megatron.parallel.tensor_parallel import Dropout

pytestmark = pytest.mark.gpu


def draw(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed_generators(3)
    device = torch.device("cuda")
    with own_randomness(TensorGroup(2, rank, None), device):
        own = torch.rand(8, device=device)
    return own, torch.rand(8, device=device)


def test_own_numbers_differ_and_common_ones_agree():
    (own, after), (other, other_after) = draw(0), draw(1)
    assert not torch.equal(own, other)
    assert torch.equal(after, other_after)
    assert torch.equal(own, draw(0)[0])


def test_recomputation_draws_the_same_mask():
    layer = Dropout(0.5, TensorGroup(2, 1, None, sequence_parallel=True))
    x = torch.ones(1000, device="cuda", requires_grad=True)
    seen = []

    def twice(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer(layer(x)))
        return seen[-1] ** 2

    run_seeded(twice, x, lambda: seed_generators(5), recompute=True).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert 0.2 < float((seen[0] > 0).double().mean()) < 0.3
