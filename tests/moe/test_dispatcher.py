"""Tokens get into their experts' rows and the outputs come back, on one process."""

from collections.abc import Callable

import pytest
import torch

from megatron.moe.dispatcher import CapacityDispatcher, DroplessDispatcher
from megatron.moe.operations import OperationChoice
from megatron.moe.plan import RoutingPlan, count_experts, slots
from megatron.parallel.groups import ExpertGroup

ALONE = ExpertGroup(1, 0, None)
T, K, E, H = 9, 2, 4, 3


class ElementwiseExperts:
    """Experts that apply one function to each number and keep the rows they got."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> None:
        self.function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.rows = x
        return self.function(x)

    def forward_sorted(self, x_RH: torch.Tensor, counts_L: torch.Tensor) -> torch.Tensor:
        self.counts_L = counts_L
        return self(x_RH)


def make_plan(capacity: int | None, dtype=torch.float32) -> RoutingPlan:
    torch.manual_seed(0)
    expert_TK = torch.rand(T, E).argsort(1)[:, :K]
    counts_E = count_experts(expert_TK, E)
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(K, T).T
    gate_TK = torch.rand(T, K, dtype=dtype)
    if capacity is not None:
        gate_TK = gate_TK.masked_fill(slot_TK >= capacity, 0.0)
    return RoutingPlan(expert_TK, gate_TK, slot_TK, counts_E, capacity)


def dispatch(plan: RoutingPlan, x: torch.Tensor, experts: ElementwiseExperts, **options) -> torch.Tensor:
    dispatcher = (DroplessDispatcher if plan.capacity is None else CapacityDispatcher)(ALONE, OperationChoice())
    return dispatcher(x, plan, experts, **options)


def test_capacity_buffers_hold_each_kept_token_once_and_zeros_elsewhere():
    plan, x_TH, experts = make_plan(capacity=4), torch.randn(T, H), ElementwiseExperts()
    assert plan.dropped > 0
    dispatch(plan, x_TH, experts)
    expected = torch.zeros(E, 4, H)
    for t in range(T):
        for k in range(K):
            if plan.slot_TK[t, k] < 4:
                expected[plan.expert_TK[t, k], plan.slot_TK[t, k]] = x_TH[t]
    assert torch.equal(experts.rows[:, 0], expected)


def test_dropless_rows_are_sorted_by_expert():
    plan, x_TH, experts = make_plan(capacity=None), torch.randn(T, H), ElementwiseExperts()
    dispatch(plan, x_TH, experts)
    assert torch.equal(experts.counts_L, plan.counts_E)
    in_order = [t for e in range(E) for k in range(K) for t in range(T) if plan.expert_TK[t, k] == e]
    assert torch.equal(experts.rows, x_TH[in_order])


@pytest.mark.parametrize("capacity", [1, 4, 20, None])
def test_identity_experts_multiply_by_the_kept_gates(capacity):
    plan, x = make_plan(capacity), torch.randn(3, 3, H)
    y = dispatch(plan, x, ElementwiseExperts())
    torch.testing.assert_close(y, (x.view(T, H) * plan.gate_TK.sum(1, keepdim=True)).view(x.shape))


@pytest.mark.parametrize("capacity", [4, None])
def test_what_overlaps_runs_once_before_the_experts(capacity):
    order = []
    experts = ElementwiseExperts(lambda x: order.append("experts") or x.clone())
    dispatch(make_plan(capacity), torch.randn(T, H), experts, overlap=lambda: order.append("overlap"))
    assert order == ["overlap", "experts"]


@pytest.mark.parametrize("capacity", [4, None])
def test_gradients_reach_input_and_gates(capacity):
    plan = make_plan(capacity, torch.float64)

    def squares(x_TH, gate_TK):
        changed = RoutingPlan(plan.expert_TK, gate_TK, plan.slot_TK, plan.counts_E, capacity)
        return dispatch(changed, x_TH, ElementwiseExperts(torch.square))

    x_TH = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squares, (x_TH, plan.gate_TK.clone().requires_grad_()))


def test_what_is_in_a_row_of_no_token_never_reaches_the_output():
    plan, x_TH = make_plan(capacity=4), torch.randn(T, H, requires_grad=True)

    def spoil(buffer: torch.Tensor) -> torch.Tensor:
        empty = (buffer == 0).all(-1, keepdim=True)
        assert empty.any()
        return buffer.masked_fill(empty, torch.inf)

    y_TH = dispatch(plan, x_TH, ElementwiseExperts(spoil))
    assert y_TH.isfinite().all()
    y_TH.sum().backward()
    assert x_TH.grad.isfinite().all()


def test_bf16_outputs_are_weighted_and_summed_in_fp32():
    plan, x_TH = make_plan(capacity=None), torch.randn(T, H).bfloat16()
    y_TH = dispatch(plan, x_TH, ElementwiseExperts())
    assert y_TH.dtype == torch.bfloat16
    exact = sum(x_TH.float() * plan.gate_TK[:, k, None] for k in range(K))
    assert torch.equal(y_TH, exact.bfloat16())
