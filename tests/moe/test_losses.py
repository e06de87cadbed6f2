"""Load-balancing loss and z-loss against their formulas written out."""

import math

import pytest
import torch

from megatron.moe.losses import load_balancing_loss, z_loss


def test_load_balancing_loss_is_one_when_even_and_e_when_one_expert_takes_all():
    even = load_balancing_loss(torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4)
    torch.testing.assert_close(even, torch.tensor(1.0))
    gate_TE = torch.zeros(8, 4)
    gate_TE[:, 2] = 1.0
    one = load_balancing_loss(gate_TE, torch.full((8, 1), 2))
    torch.testing.assert_close(one, torch.tensor(4.0))


@pytest.mark.parametrize("topk", [1, 3])
def test_load_balancing_loss_is_its_formula(topk):
    torch.manual_seed(0)
    gate_TE = torch.rand(10, 5, dtype=torch.float64).softmax(-1)
    expert_TK = gate_TE.topk(topk).indices
    expected = 0.0
    for e in range(5):
        chosen = sum(e in row for row in expert_TK.tolist()) / (10 * topk)
        expected += 5 * gate_TE[:, e].mean().item() * chosen
    assert math.isclose(load_balancing_loss(gate_TE, expert_TK).item(), expected, rel_tol=1e-12)


def test_z_loss_is_its_formula_and_pulls_logits_down():
    logits_TE = torch.tensor([[0.0, 0.0], [3.0, 3.0]], requires_grad=True)
    loss = z_loss(logits_TE)
    expected = (math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    loss.backward()
    assert (logits_TE.grad > 0).all()


def test_no_tokens_cost_nothing():
    none = torch.zeros(0, 4, requires_grad=True)
    assert load_balancing_loss(none.softmax(-1), torch.zeros(0, 1, dtype=torch.int64)).item() == 0.0
    assert z_loss(none).item() == 0.0
