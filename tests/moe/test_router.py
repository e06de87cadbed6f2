"""Who goes where: choices, gates, who is dropped, and what is random when."""

import pytest
import torch

from megatron.config import MoEConfig
from megatron.moe.router import Router

H = 8


def make_router(experts=4, train=True, **moe) -> Router:
    torch.manual_seed(0)
    router = Router(H, experts, MoEConfig(num_experts=(experts,), **moe)).train(train)
    torch.nn.init.normal_(router.weight)
    return router


def one_hot_router(logits_TE: torch.Tensor, **moe) -> tuple[Router, torch.Tensor]:
    """A router and an input such that the logits are exactly ``logits_TE``."""
    router = Router(logits_TE.size(1), logits_TE.size(1), MoEConfig(num_experts=(logits_TE.size(1),), **moe))
    torch.nn.init.eye_(router.weight)
    return router, logits_TE.clone()


def upper(quantile_z: float, degrees: int) -> float:
    """Quantile of the chi-square distribution (Wilson and Hilferty 1931); ``quantile_z`` is the normal one."""
    a = 2 / (9 * degrees)
    return degrees * (1 - a + quantile_z * a**0.5) ** 3


def test_top1_gate_is_the_probability_and_topk_gates_sum_to_one():
    x_TH = torch.randn(20, H)
    for topk in (1, 2, 3):
        router = make_router(topk=topk, moe_token_dropping=False)
        plan = router(x_TH).plan
        probability_TE = (x_TH @ router.weight.T).softmax(-1)
        expected = probability_TE.topk(topk)
        assert torch.equal(plan.expert_TK, expected.indices)
        gates = expected.values if topk == 1 else expected.values / expected.values.sum(-1, keepdim=True)
        torch.testing.assert_close(plan.gate_TK, gates)
        assert plan.capacity is None


def test_equal_logits_go_to_the_lowest_expert():
    router = make_router(topk=2, train=False)
    plan = router(torch.zeros(5, H)).plan
    assert plan.expert_TK.tolist() == [[0, 1]] * 5


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("rts", [True, False])
def test_an_over_full_expert_keeps_exactly_its_capacity_in_distinct_slots(topk, rts):
    router = make_router(topk=topk, moe_rts=rts, moe_min_capacity=1)
    plan = router(torch.randn(64, H) + 1).plan
    kept_TK = plan.slot_TK < plan.capacity
    assert plan.capacity == 16 * topk
    assert plan.counts_E.max() > plan.capacity, "an expert must be over-full for this test to mean anything"
    assert plan.dropped.item() == (~kept_TK).sum().item() > 0
    assert torch.equal(plan.gate_TK == 0, ~kept_TK)
    for e in range(4):
        kept = plan.slot_TK[(plan.expert_TK == e) & kept_TK].sort().values
        assert kept.tolist() == list(range(min(plan.capacity, plan.counts_E[e].item())))


def test_without_rts_first_tokens_stay_and_first_choices_go_before_second_ones():
    # Tokens 0 to 3 choose expert 0, then 1; tokens 4 to 7 choose 1, then 0. Each expert has room for 5.
    logits_TE = torch.tensor([[2.0, 1.0, -9.0, -9.0]] * 4 + [[1.0, 2.0, -9.0, -9.0]] * 4)
    router, x = one_hot_router(logits_TE, topk=2, moe_rts=False, moe_train_capacity_factor=1.25, moe_min_capacity=1)
    plan = router(x).plan
    kept_TK = plan.slot_TK < plan.capacity
    assert plan.capacity == 5
    assert kept_TK[:, 0].all()
    assert kept_TK[:, 1].tolist() == [True, False, False, False] * 2
    both = torch.tensor([2.0, 1.0]).softmax(0)
    torch.testing.assert_close(plan.gate_TK[0], both)
    torch.testing.assert_close(plan.gate_TK[1], torch.tensor([1.0, 0.0]))  # the one kept counts for all


def test_rts_of_top2_still_puts_first_choices_before_second_ones():
    logits_TE = torch.tensor([[2.0, 1.0, -9.0, -9.0]] * 4 + [[1.0, 2.0, -9.0, -9.0]] * 4)
    router, x = one_hot_router(logits_TE, topk=2, moe_train_capacity_factor=1.25, moe_min_capacity=1)
    torch.manual_seed(0)
    seen = set()
    for _ in range(50):
        plan = router(x).plan
        kept_TK = plan.slot_TK < plan.capacity
        assert kept_TK[:, 0].all()
        assert kept_TK[:4, 1].sum() == kept_TK[4:, 1].sum() == 1
        seen.add(kept_TK[:4, 1].nonzero().item())
    assert seen == {0, 1, 2, 3}


def test_above_two_choices_the_highest_gates_stay():
    logits_TE = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    router, x = one_hot_router(logits_TE, topk=3, moe_train_capacity_factor=0.5, moe_min_capacity=1)
    plan = router(x).plan
    probability_TE = logits_TE.softmax(-1)
    for e in range(4):
        mine = [
            (probability_TE[t, e].item(), bool(plan.slot_TK[t, k] < plan.capacity))
            for t in range(12)
            for k in range(3)
            if plan.expert_TK[t, k] == e
        ]
        mine.sort(reverse=True)
        assert [kept for _, kept in mine] == [i < plan.capacity for i in range(len(mine))]


def test_random_token_selection_is_uniform():
    """Chi-square test: how often each of 64 tokens is among the 16 that an expert keeps, in 1 500 draws."""
    T, C, draws = 64, 16, 1500
    router, x = one_hot_router(torch.tensor([[1.0, 0.0, 0.0, 0.0]] * T), moe_min_capacity=1)
    torch.manual_seed(0)
    kept_T = torch.zeros(T, dtype=torch.float64)
    for _ in range(draws):
        plan = router(x).plan
        assert plan.capacity == C
        kept_T += (plan.slot_TK[:, 0] < C).double()
    assert kept_T.sum() == C * draws
    share = C / T
    # Draws without replacement: the T counts have covariance n p (1 - p) (identity - 1/T) * T / (T - 1).
    statistic = ((kept_T - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (T - 1) / T
    assert upper(-3.1, T - 1) < statistic < upper(3.1, T - 1)


def test_random_selection_has_the_counts_of_deepspeeds():
    from deepspeed.moe.sharded_moe import top1gating

    router = make_router(experts=8)
    x_TH = torch.randn(96, H) + 0.5
    plan = router(x_TH).plan
    _, _, dispatch_TEC, counts_E = top1gating(router.logits(x_TH).detach(), 1.0, 4, use_rts=True)
    assert torch.equal(plan.counts_E, counts_E)
    kept_T = plan.slot_TK[:, 0] < plan.capacity
    kept_E = torch.bincount(plan.expert_TK[kept_T, 0], minlength=8)
    assert torch.equal(kept_E, dispatch_TEC.sum((0, 2)))
    assert plan.dropped > 0


def test_jitter_moves_logits_a_little_in_training_only():
    router, x_TH = make_router(moe_noise_policy="Jitter"), torch.randn(50, H)
    exact = x_TH @ router.weight.T
    noisy = router.logits(x_TH)
    assert not torch.equal(noisy, router.logits(x_TH))
    bound = 0.01 * (x_TH.abs() @ router.weight.abs().T) + 1e-5
    assert ((noisy - exact).abs() < bound).all()
    assert ((noisy - exact).abs() > 0.1 * bound).any()
    router.eval()
    torch.testing.assert_close(router.logits(x_TH), exact)


def test_rsample_draws_from_the_softmax_and_leaves_gates_and_losses_without_noise():
    probability_E = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 4000
    router, x = one_hot_router(probability_E.log().repeat(draws, 1), moe_noise_policy="RSample")
    torch.manual_seed(0)
    routing = router(x)
    expected_E = draws * probability_E
    statistic = ((routing.plan.counts_E - expected_E) ** 2 / expected_E).sum()
    assert statistic < upper(3.1, 3)
    kept_T = routing.plan.slot_TK[:, 0] < routing.plan.capacity
    gates = probability_E[routing.plan.expert_TK[:, 0]]
    torch.testing.assert_close(routing.plan.gate_TK[:, 0], gates * kept_T)
    torch.testing.assert_close(routing.z_loss, torch.tensor(0.0))
    router.eval()
    assert router(x).plan.counts_E.tolist() == [draws, 0, 0, 0]


def test_rsample_of_top2_draws_two_different_experts_without_replacement():
    probability_E = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 4000
    router, x = one_hot_router(probability_E.log().repeat(draws, 1), topk=2, moe_noise_policy="RSample")
    torch.manual_seed(0)
    expert_TK = router(x).plan.expert_TK
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    pair_EE = probability_E[:, None] * probability_E / (1 - probability_E[:, None])
    pair_EE.fill_diagonal_(0)
    found_EE = torch.bincount(expert_TK[:, 0] * 4 + expert_TK[:, 1], minlength=16).view(4, 4)
    expected = draws * pair_EE[pair_EE > 0]
    statistic = ((found_EE[pair_EE > 0] - expected) ** 2 / expected).sum()
    assert statistic < upper(3.1, 11)


def test_evaluation_is_deterministic_and_drops_nothing_unless_told():
    x_TH = torch.randn(64, H) + 1
    router = make_router(train=False, moe_noise_policy="RSample", moe_train_capacity_factor=0.5)
    first, second = router(x_TH).plan, router(x_TH).plan
    assert first.capacity is None
    assert first.dropped.item() == 0
    assert torch.equal(first.gate_TK, second.gate_TK)
    assert torch.equal(first.slot_TK, second.slot_TK)
    router = make_router(train=False, moe_eval_capacity_factor=0.5, moe_min_capacity=1)
    first, second = router(x_TH).plan, router(x_TH).plan
    assert first.capacity == 8
    assert first.dropped > 0
    assert torch.equal(first.gate_TK, second.gate_TK)
    for e in range(4):  # first come, first served
        mine = first.slot_TK[:, 0][first.expert_TK[:, 0] == e]
        assert mine.tolist() == list(range(len(mine)))


def test_gates_are_fp32_for_bf16_parameters_and_input():
    router, x_TH = make_router().to(torch.bfloat16), torch.randn(30, H).bfloat16()
    routing = router(x_TH)
    assert routing.plan.gate_TK.dtype == routing.aux_loss.dtype == routing.z_loss.dtype == torch.float32
    torch.testing.assert_close(router.logits(x_TH), x_TH.float() @ router.weight.float().T)


@pytest.mark.parametrize("topk", [0, 5])
def test_topk_must_be_between_one_and_the_experts(topk):
    with pytest.raises(ValueError, match=f"--topk {topk} of 4 experts; give a number from 1 to 4"):
        make_router(topk=topk)


def test_an_unknown_noise_policy():
    with pytest.raises(ValueError, match="unknown noise policy 'Loud'; give Jitter, RSample or None"):
        make_router(moe_noise_policy="Loud")
