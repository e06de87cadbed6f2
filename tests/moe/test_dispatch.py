"""Tokens reach their experts' rows and the answers come back, on one process."""

import pytest
import torch

from megatron.moe.dispatch import CapacityExchange, DroplessExchange
from megatron.moe.plan import RoutingPlan, count_experts, slots
from megatron.parallel.groups import ExpertGroup

ALONE = ExpertGroup(1, 0, None)
T, K, E, H = 9, 2, 4, 3


def make_plan(capacity: int | None, dtype=torch.float32) -> RoutingPlan:
    torch.manual_seed(0)
    expert_TK = torch.rand(T, E).argsort(1)[:, :K]
    counts_E = count_experts(expert_TK, E)
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(K, T).T
    gate_TK = torch.rand(T, K, dtype=dtype)
    if capacity is not None:
        gate_TK = gate_TK.masked_fill(slot_TK >= capacity, 0.0)
    return RoutingPlan(expert_TK, gate_TK, slot_TK, counts_E, capacity)


def dispatched(exchange: CapacityExchange | DroplessExchange, x_TH: torch.Tensor) -> torch.Tensor:
    (trip,) = exchange.dispatch(x_TH)
    return exchange.arrive(trip)  # with a capacity [E, 1, C, H]


def combined(exchange: CapacityExchange | DroplessExchange, y: torch.Tensor) -> torch.Tensor:
    return exchange.combine([exchange.send_back(y)])


def test_capacity_buffers_hold_each_kept_token_once_and_zeros_elsewhere():
    plan, x_TH = make_plan(capacity=4), torch.randn(T, H)
    assert plan.dropped > 0
    buffer = dispatched(CapacityExchange(plan, ALONE), x_TH)
    expected = torch.zeros(E, 4, H)
    for t in range(T):
        for k in range(K):
            if plan.slot_TK[t, k] < 4:
                expected[plan.expert_TK[t, k], plan.slot_TK[t, k]] = x_TH[t]
    assert torch.equal(buffer[:, 0], expected)


def test_dropless_rows_are_sorted_by_expert():
    plan, x_TH = make_plan(capacity=None), torch.randn(T, H)
    exchange = DroplessExchange(plan, ALONE)
    rows = dispatched(exchange, x_TH)
    assert exchange.rows_per_expert == plan.counts_E.tolist()
    in_order = [t for e in range(E) for k in range(K) for t in range(T) if plan.expert_TK[t, k] == e]
    assert torch.equal(rows, x_TH[in_order])


@pytest.mark.parametrize("capacity", [1, 4, 20, None])
def test_there_and_back_multiplies_by_the_kept_gates(capacity):
    plan, x_TH = make_plan(capacity), torch.randn(T, H)
    exchange = (DroplessExchange if capacity is None else CapacityExchange)(plan, ALONE)
    y_TH = combined(exchange, dispatched(exchange, x_TH))
    torch.testing.assert_close(y_TH, x_TH * plan.gate_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("capacity", [4, None])
def test_gradients_reach_input_and_gates(capacity):
    plan = make_plan(capacity, torch.float64)

    def there_and_back(x_TH, gate_TK):
        changed = RoutingPlan(plan.expert_TK, gate_TK, plan.slot_TK, plan.counts_E, capacity)
        exchange = (DroplessExchange if capacity is None else CapacityExchange)(changed, ALONE)
        return combined(exchange, dispatched(exchange, x_TH) ** 2)

    x_TH = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there_and_back, (x_TH, plan.gate_TK.clone().requires_grad_()))


def test_what_is_in_a_row_of_no_token_never_reaches_the_output():
    plan, x_TH = make_plan(capacity=4), torch.randn(T, H, requires_grad=True)
    exchange = CapacityExchange(plan, ALONE)
    buffer = dispatched(exchange, x_TH)
    empty = (buffer == 0).all(-1, keepdim=True)
    assert empty.any()
    y_TH = combined(exchange, buffer.masked_fill(empty, torch.inf))
    assert y_TH.isfinite().all()
    y_TH.sum().backward()
    assert x_TH.grad.isfinite().all()


def test_bf16_answers_are_weighted_and_summed_in_fp32():
    plan, x_TH = make_plan(capacity=None), torch.randn(T, H).bfloat16()
    exchange = DroplessExchange(plan, ALONE)
    y_TH = combined(exchange, dispatched(exchange, x_TH))
    assert y_TH.dtype == torch.bfloat16
    exact = sum(x_TH.float() * plan.gate_TK[:, k, None] for k in range(K))
    assert torch.equal(y_TH, exact.bfloat16())
