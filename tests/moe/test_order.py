"""The random order of tokens."""

import pytest
import torch

from megatron.moe.order import random_order


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 1025])
def test_it_is_a_permutation_that_follows_from_the_seed(count):
    orders = [random_order(count, torch.tensor(seed)) for seed in (5, 5, 2**61 + 3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(orders[0], orders[1])
    if count > 3:
        assert not torch.equal(orders[0], orders[2])


def test_every_number_comes_equally_often_in_every_quarter():
    count, draws = 60, 2000
    seeds = torch.randint(2**62, (draws,), generator=torch.Generator().manual_seed(1))
    places = torch.stack([random_order(count, seed).argsort() for seed in seeds])  # of each number in each order
    for quarter in range(4):
        share = (places // (count // 4) == quarter).double().mean(0)
        assert (share - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / draws) ** 0.5
    # and two numbers stand in the same half about as often as chance has it
    same = ((places[:, 0] < 30) == (places[:, 1] < 30)).double().mean()
    chance = 29 / 59
    assert abs(float(same) - chance) < 4.5 * (chance * (1 - chance) / draws) ** 0.5
