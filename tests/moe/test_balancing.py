"""Balancers: what they learn of an update, and what that changes."""

import copy

import pytest
import torch

from megatron.config import MoEConfig
from megatron.moe import balancing
from megatron.moe.balancing import learn, learned_buffers, learners
from megatron.moe.router import Router
from megatron.parallel.groups import ALONE

H, E = 16, 8
METHODS = {
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "quantile_balancing": {"moe_router_load_balancing_type": "quantile_balancing"},
    "expert_bias": {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True},
}


def make_router(method: str, topk: int = 1, **moe) -> Router:
    torch.manual_seed(0)
    router = Router(H, E, MoEConfig(num_experts=(E,), topk=topk, **METHODS[method], **moe))
    torch.nn.init.normal_(router.weight, std=0.2)
    return router


def tokens(count: int, seed: int, shared: float = 1.0) -> torch.Tensor:
    """Tokens with a component that they share, which makes a few experts everybody's favourites."""
    mean_H = torch.randn(H, generator=torch.Generator().manual_seed(0)) * shared
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)) + mean_H


def update(router: Router, finite: bool = True) -> None:
    learn(learners(router), None, ALONE, finite)


def busiest(router: Router, x: torch.Tensor) -> float:
    counts_E = router(x).plan.counts_E.double()
    return float(counts_E.max() / counts_E.mean())


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(("method", "updates"), [("quantile_balancing", 6), ("expert_bias", 30)])
def test_biases_make_loads_even(method, updates, topk):
    router = make_router(method, topk)
    before = busiest(router, tokens(4000, 1))
    router.balancer.statistics.zero_()
    for seed in range(2, 2 + updates):
        router(tokens(4000, seed))
        update(router)
    assert before > 1.8
    assert busiest(router, tokens(4000, 100)) < 1.2


def test_one_update_finds_the_bias_of_an_expert_that_takes_all():
    router = make_router("quantile_balancing")
    with torch.no_grad():
        router.weight[3] += 0.5 * tokens(1000, 1).mean(0)
    counts = []
    for seed in (1, 2):
        counts.append(int(router(tokens(4000, seed)).plan.counts_E[3]))
        update(router)
    assert counts[0] > 3900
    assert 400 < counts[1] < 600


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topk", [1, 2])
def test_micro_batches_and_their_sizes_do_not_matter(method, topk):
    whole, parts = make_router(method, topk), make_router(method, topk)
    for seed in range(3):
        x = tokens(300, seed)
        whole(x)
        for piece in x.split([10, 200, 0, 90]):
            parts(piece)
        assert torch.equal(whole.balancer.statistics, parts.balancer.statistics)
        assert whole.balancer.statistics.sum() > 0
        for router in (whole, parts):
            update(router)
            assert not router.balancer.statistics.any()
    assert all(map(torch.equal, whole.buffers(), parts.buffers()))


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_nothing_of_earlier_ones(method):
    router = make_router(method)
    for seed in range(3):
        router(tokens(500, seed))
        update(router)
    x = tokens(400, 9)
    assert torch.equal(router(x).plan.expert_TK[:100], router(x[:100]).plan.expert_TK)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_uses_what_was_learned_and_learns_nothing(method):
    router = make_router(method)
    router(tokens(500, 1))
    update(router)
    before = copy.deepcopy(dict(router.named_buffers()))
    trained = router(tokens(300, 2)).plan.expert_TK
    router.balancer.statistics.zero_()
    assert torch.equal(router.eval()(tokens(300, 2)).plan.expert_TK, trained)
    assert all(torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_update_teaches_nothing_and_is_forgotten(method):
    router = make_router(method)
    before = copy.deepcopy(learned_buffers(router))
    router(tokens(500, 1))
    update(router, finite=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in learned_buffers(router).items())
    assert not router.balancer.statistics.any()


@pytest.mark.parametrize("method", ["quantile_balancing", "expert_bias"])
@pytest.mark.parametrize("topk", [1, 2])
def test_gates_and_losses_are_those_of_the_logits_alone(method, topk):
    router = make_router(method, topk, moe_token_dropping=False)
    router.balancer.expert_bias.copy_(torch.linspace(-3, 3, E))
    x = tokens(50, 1)
    routing = router(x)
    logits_TE = x @ router.weight.T
    chosen = (logits_TE + router.balancer.expert_bias).topk(topk)[1]
    gate_TK = logits_TE.softmax(-1).gather(1, chosen)
    assert torch.equal(routing.plan.expert_TK, chosen)
    assert not torch.equal(chosen, logits_TE.topk(topk)[1])
    torch.testing.assert_close(routing.plan.gate_TK, gate_TK if topk == 1 else gate_TK / gate_TK.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.z_loss, logits_TE.logsumexp(-1).square().mean())


def test_global_loads_weigh_the_gates_of_the_next_update():
    router = make_router("global_aux_loss")
    even = router(tokens(200, 1)).aux_loss
    torch.testing.assert_close(even, torch.ones(()))  # nothing is known yet: all loads count as even
    counts_E = router(tokens(300, 2)).plan.counts_E + router(tokens(200, 1)).plan.counts_E
    router.balancer.statistics.copy_(counts_E)
    update(router)
    x = tokens(100, 3)
    gate_TE = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(router(x).aux_loss, E * (gate_TE.mean(0) * counts_E / counts_E.sum()).sum())


@pytest.mark.parametrize("shares", [(0.1, 0.5, 0.9)])
def test_quantiles_are_those_of_torch_to_a_bin(shares):
    shift_N = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 3 + 1
    histogram = torch.bincount(balancing.shift_bins(shift_N), minlength=balancing.BINS)[None, None]
    for share in shares:
        expected = float(torch.quantile(shift_N, share))
        found = float(balancing.quantile(histogram, share))
        assert abs(found - expected) < 0.01 + 0.02 * abs(expected)


def test_bins_hold_whatever_scores_may_differ_by():
    wild = torch.tensor([-torch.inf, -1e9, -1e-9, 0.0, 1e-9, 1e9, torch.inf, torch.nan])
    bins = balancing.shift_bins(wild)
    assert bins.min() >= 0
    assert bins.max() < balancing.BINS
    assert bins[0] == bins[1] == 0
    assert bins[5] == bins[6] == balancing.BINS - 1


def test_steps_of_a_bias_grow_in_one_direction_and_shrink_when_it_turns():
    router = make_router("expert_bias", moe_router_bias_update_rate=0.01)
    balancer = router.balancer
    steps = []
    for counts in ([4, 0], [4, 0], [4, 0], [0, 4], [4, 0], [0, 4], [2, 2]):
        balancer.statistics[:] = 2
        balancer.statistics[0, :2] = torch.tensor(counts)
        update(router)
        steps.append(round(float(balancer.bias_step[1]), 6))
    assert steps == [0.01, 0.015, 0.0225, -0.01125, 0.01, -0.01, 0.0]
    assert abs(float(balancer.expert_bias.sum())) < 1e-6


def test_biases_keep_their_number_format():
    router = make_router("quantile_balancing").bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.balancer.expert_bias.dtype == torch.float32
    assert router.balancer.statistics.dtype == torch.int32
    with torch.device("meta"):
        empty = make_router("quantile_balancing")
    assert empty.half().to_empty(device="cpu").balancer.expert_bias.dtype == torch.float32


def test_a_centered_router_subtracts_the_mean_of_the_update_before():
    router = make_router("quantile_balancing", moe_router_center_input=True, moe_token_dropping=False)
    x = tokens(500, 1, shared=3.0)
    plain = make_router("quantile_balancing", moe_token_dropping=False)
    assert torch.equal(router(x).plan.gate_TK, plain(x).plan.gate_TK)  # nothing is known yet
    update(router)
    torch.testing.assert_close(router.centering.input_mean, x.mean(0))
    router.balancer.expert_bias.zero_()
    new = tokens(200, 2, shared=3.0)
    torch.testing.assert_close(router(new).plan.gate_TK, plain(new - x.mean(0)).plan.gate_TK)


def test_the_mean_does_not_depend_on_micro_batches_and_keeps_its_number_format():
    whole, parts = (make_router("quantile_balancing", moe_router_center_input=True) for _ in range(2))
    x = tokens(300, 1)
    whole(x)
    for piece in x.split([10, 200, 0, 90]):
        parts(piece)
    for router in (whole, parts):
        update(router)
    torch.testing.assert_close(whole.centering.input_mean, parts.centering.input_mean)
    before = whole.centering.input_mean.clone()
    update(whole)  # without tokens
    assert torch.equal(whole.centering.input_mean, before)
    router = whole.bfloat16()
    assert (router.centering.input_mean.dtype, router.centering.statistics.dtype) == (torch.float32, torch.float64)
    assert torch.equal(router.centering.input_mean, before)
