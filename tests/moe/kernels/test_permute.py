"""Rows of K assignments a token: the row map, permute, unpermute and all gradients, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.moe.kernels import permute
from megatron.moe.plan import RoutingPlan, count_experts, slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIZES = [(30, 1, 4, 70), (30, 2, 4, 70), (9, 3, 5, 8), (1, 2, 2, 1030), (90, 4, 8, 16)]  # T, K, E, H


def make_plan(T: int, K: int, E: int, capacity: int | None) -> RoutingPlan:
    generator = torch.Generator().manual_seed(T + K)
    expert_TK = (torch.rand(T, E, generator=generator) * torch.linspace(1, 2, E)).argsort(1)[:, :K]
    counts_E = count_experts(expert_TK, E)
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(K, T).T  # not contiguous, as the router's
    gate_TK = torch.rand(T, K, generator=generator) + 0.1
    if capacity is not None:
        gate_TK = gate_TK.masked_fill(slot_TK >= capacity, 0.0)
    tensors = (tensor.to(DEVICE) for tensor in (expert_TK, gate_TK, slot_TK, counts_E))
    return RoutingPlan(*tensors, capacity)


def row_map(plan: RoutingPlan, chunk: int | None = None) -> permute.RowMap:
    if plan.capacity is None:
        return permute.sorted_row_map(plan.expert_TK, plan.slot_TK, plan.counts_E)
    return permute.buffer_row_map(plan.expert_TK, plan.slot_TK, plan.counts_E.numel(), plan.capacity, chunk)


@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
@pytest.mark.parametrize(("capacity", "chunk"), [(None, None), (5, None), (5, 2), (7, 3), (400, 399)])
def test_the_row_map_is_the_plans(T, K, E, H, capacity, chunk):
    plan = make_plan(T, K, E, capacity)
    found = row_map(plan, chunk)
    assert found.row_N.dtype == found.assignment_R.dtype == torch.int32
    if capacity is None:
        expected_N, size = plan.sorted_row_TK().flatten(), T * K
    else:
        expected_N, size = plan.buffer_row_TK(chunk).flatten(), E * capacity
        assert bool(plan.dropped) == bool((expected_N == size).any())
    kept_N = expected_N < size
    assert torch.equal(found.row_N.long(), expected_N.where(kept_N, -1))
    assignment_R = torch.full((size,), -1, device=DEVICE)
    assignment_R[expected_N[kept_N]] = torch.arange(T * K, device=DEVICE)[kept_N]
    assert torch.equal(found.assignment_R.long(), assignment_R)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_there_and_back_and_all_gradients_are_those_of_float64(T, K, E, H, capacity, dtype):
    plan = make_plan(T, K, E, capacity)
    found = row_map(plan)
    generator = torch.Generator().manual_seed(H)
    R = found.assignment_R.numel()
    x_TH, dy_TH = (torch.randn(T, H, generator=generator).to(DEVICE, dtype) for _ in range(2))
    y_RH, dx_RH = (torch.randn(R, H, generator=generator).to(DEVICE, dtype) for _ in range(2))
    y_RH[found.assignment_R < 0] = torch.nan  # what is in rows of no token must not matter

    def near(mine: torch.Tensor, exact: torch.Tensor) -> bool:
        return bool((mine.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm())  # never with NaN

    mine = x_TH.clone().requires_grad_()
    exact = x_TH.double().requires_grad_()
    there, expected = permute.permute(mine, found), permute.permute_reference(exact, found)
    assert torch.equal(there.double(), expected)
    there.backward(dx_RH)
    expected.backward(dx_RH.double())
    assert near(mine.grad, exact.grad)

    mine, gate_TK = y_RH.clone().requires_grad_(), plan.gate_TK.clone().requires_grad_()
    exact, exact_gate_TK = y_RH.nan_to_num().double().requires_grad_(), plan.gate_TK.double().requires_grad_()
    back, expected = permute.unpermute(mine, gate_TK, found), permute.unpermute_reference(exact, exact_gate_TK, found)
    assert near(back, expected)
    back.backward(dy_TH)
    expected.backward(dy_TH.double())
    assert near(mine.grad, exact.grad)
    assert near(gate_TK.grad, exact_gate_TK.grad)


def test_gradients_of_another_order_in_memory():
    """As a sum or a transpose gives them."""
    plan = make_plan(30, 2, 4, 5)
    found = row_map(plan)
    x_TH = torch.randn(30, 16, device=DEVICE, requires_grad=True)
    permute.unpermute(permute.permute(x_TH, found), plan.gate_TK, found).sum().backward()
    torch.testing.assert_close(x_TH.grad, plan.gate_TK.sum(1, keepdim=True).expand(-1, 16))
