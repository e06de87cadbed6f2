"""Counting, capacity and slots."""

import math

import pytest
import torch

from megatron.moe.plan import RoutingPlan, count_experts, dropped_by_chance, expert_capacity, slots


def make_plan(expert_TK, counts_E, capacity) -> RoutingPlan:
    T, K = expert_TK.shape
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(K, T).T
    return RoutingPlan(expert_TK, torch.ones(T, K), slot_TK, counts_E, capacity)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "factor", "least", "expected"),
    [
        (64, 4, 1, 1.0, 4, 16),
        (65, 4, 1, 1.0, 4, 17),
        (64, 4, 2, 1.25, 4, 40),
        (1, 128, 1, 1.0, 4, 4),  # fewer tokens than the least capacity
        (0, 4, 1, 1.0, 4, 4),
        (100, 10, 1, 1.1, 1, 11),  # 10 * 1.1 is 11.000000000000002 in floats
        (100, 2, 1, 2.4, 1, 120),
        (65536, 128, 1, 1.0, 4, 512),
    ],
)
def test_capacity(tokens, experts, topk, factor, least, expected):
    assert expert_capacity(tokens, experts, topk, factor, least) == expected


def test_capacity_equals_deepspeeds_but_for_its_rounding():
    from deepspeed.moe.sharded_moe import _capacity

    differ = 0
    for tokens in (1, 7, 64, 100, 1000, 4096, 10000, 32768):
        for experts in (2, 3, 8, 10, 64, 128):
            for factor in (0.5, 1.0, 1.1, 1.25, 1.6, 2.0, 2.4):
                for topk in (1, 2, 3):
                    gates = torch.empty(tokens, experts, device="meta")
                    theirs = int(_capacity(gates, torch.tensor(factor * topk), torch.tensor(4)))
                    ours = expert_capacity(tokens, experts, topk, factor, 4)
                    if ours != theirs:  # a whole product that fp32 rounds up
                        differ += 1
                        assert theirs == ours + 1
                        assert math.isclose(tokens / experts * factor * topk, ours, rel_tol=1e-12)
    assert differ < 25


def test_slots_count_within_each_expert_in_the_order_given():
    expert_N = torch.tensor([2, 0, 2, 2, 0, 3])
    counts_E = count_experts(expert_N[:, None], 4)
    assert counts_E.tolist() == [2, 0, 3, 1]
    assert slots(expert_N, counts_E).tolist() == [0, 0, 1, 2, 1, 0]


def test_slots_by_priority_with_ties_in_the_order_given():
    expert_N = torch.tensor([2, 0, 2, 2, 0, 3])
    priority_N = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 9.0])
    assert slots(expert_N, count_experts(expert_N[:, None], 4), priority_N).tolist() == [2, 1, 0, 1, 0, 0]


def test_rows_of_buffers_and_of_the_sorted_list():
    expert_TK = torch.tensor([[1, 0], [1, 2], [1, 0]])
    counts_E = count_experts(expert_TK, 3)
    plan = make_plan(expert_TK, counts_E, capacity=2)
    assert plan.buffer_row_TK().tolist() == [[2, 0], [3, 4], [6, 1]]  # 3 experts * 2 rows; 6 is for dropped ones
    assert plan.dropped.item() == 1
    plan = make_plan(expert_TK, counts_E, capacity=None)
    assert plan.sorted_row_TK().tolist() == [[2, 0], [3, 5], [4, 1]]
    assert plan.dropped.item() == 0
    assert plan.dropped.dtype == plan.counts_E.dtype == torch.int64


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9])
def test_rows_of_chunked_buffers_are_those_of_the_whole_ones_chunk_by_chunk(chunk):
    E, C = 3, 4
    expert_TK = torch.arange(E).repeat_interleave(6)[:, None]  # two more than an expert has room for
    plan = make_plan(expert_TK, count_experts(expert_TK, E), C)
    kept_TK = plan.slot_TK < C
    whole_EC = torch.arange(E * C).view(E, C)
    chunked = torch.cat([piece.flatten() for piece in whole_EC.split(chunk, 1)])
    row_TK = plan.buffer_row_TK(chunk)
    assert torch.equal(chunked[row_TK[kept_TK]], plan.buffer_row_TK()[kept_TK])
    assert (row_TK[~kept_TK] == E * C).all()
    assert (~kept_TK).sum() == 2 * E


@pytest.mark.parametrize(("tokens", "experts", "factor"), [(8192, 128, 1.0), (8192, 32, 1.0), (1024, 64, 1.25)])
def test_the_share_dropped_by_chance_is_that_of_random_experts(tokens, experts, factor):
    capacity = expert_capacity(tokens, experts, 1, factor, 1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [torch.bincount(torch.randint(experts, (tokens,), generator=generator), minlength=experts) for _ in range(100)]
    )
    found = float((counts - capacity).clamp(min=0).sum() / counts.sum())
    assert abs(dropped_by_chance(tokens, experts, 1, capacity) - found) < 0.002
