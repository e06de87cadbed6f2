"""The fused gate against plain torch in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.config import MoEConfig
from megatron.moe.balancing import QuantileBias
from megatron.moe.kernels import gate as module
from megatron.moe.router import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def inputs(T: int, H: int, E: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(T, H, generator=generator)
    weight_EH = torch.randn(E, H, generator=generator) / H**0.5
    weight_EH[: max(1, E // 4)] *= 2  # some experts are chosen more than others
    return x_TH.to(DEVICE, dtype), weight_EH.to(DEVICE, dtype)


SIZES = [(100, 64, 8), (64, 32, 16), (1, 32, 4), (300, 48, 3), (257, 80, 40), (33, 32, 130)]
if DEVICE == "cuda":  # where the kernels are cut otherwise
    SIZES += [(300, 96, E) for E in (257, 512, 1024)]


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "E"), SIZES)
def test_decisions_losses_and_gradients_are_those_of_float64(T, H, E, dtype, capacity_factor):
    capacity = None if capacity_factor is None else max(1, int(T / E * capacity_factor))
    x, weight = inputs(T, H, E, dtype)
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    x.requires_grad_()
    weight.requires_grad_()
    passed, found = module.gate(x, weight, capacity, random=False)
    expected = module.reference(exact_x, exact_weight, capacity)
    for name in ("expert_T", "slot_T", "row_T", "counts_E", "dropped", "token_R"):
        assert torch.equal(getattr(found, name), getattr(expected, name).to(getattr(found, name).dtype)), name
    for name in ("gate_T", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=2e-6, atol=2e-6)
    # a loss of everything that carries a gradient, the tokens themselves included
    weights = torch.linspace(-1, 1, T, device=DEVICE)
    for gating, tokens in ((found, passed), (expected, exact_x)):
        loss = (gating.gate_T * weights).sum() + 3 * gating.aux_loss + 0.1 * gating.z_loss + 0.01 * tokens.sum()
        loss.backward()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()  # NaN fails too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "E"), SIZES)
def test_a_bias_decides_the_choice_alone_and_shares_are_those_of_the_aux_loss(T, H, E, dtype):
    x, weight = inputs(T, H, E, dtype)
    bias_E = torch.linspace(-1, 1, E, device=DEVICE) * 2
    share_E = torch.rand(E, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    balance = module.Balance(bias_E, share_E)
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    x.requires_grad_()
    weight.requires_grad_()
    _, found = module.gate(x, weight, None, random=False, balance=balance)
    expected = module.reference(exact_x, exact_weight, None, balance=balance)
    unbiased = module.reference(exact_x, exact_weight, None)
    assert E == 1 or T < 10 or not torch.equal(expected.expert_T, unbiased.expert_T)
    for name in ("expert_T", "slot_T", "row_T", "counts_E", "dropped", "token_R"):
        assert torch.equal(getattr(found, name), getattr(expected, name).to(getattr(found, name).dtype)), name
    for name in ("gate_T", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=2e-6, atol=2e-6)
    for gating in (found, expected):
        ((gating.gate_T * torch.linspace(-1, 1, T, device=DEVICE)).sum() + 3 * gating.aux_loss).backward()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()  # NaN fails too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [None, 10])
def test_a_mean_is_subtracted_from_tokens_and_their_sum_is_taken(dtype, capacity):
    x, weight = inputs(100, 64, 8, dtype)
    mean_H = x.float().mean(0) + 0.5
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    x.requires_grad_()
    weight.requires_grad_()
    balance = module.Balance(mean_H=mean_H, input_sum=torch.ones(1, 65, dtype=torch.float64, device=DEVICE))
    _, found = module.gate(x, weight, capacity, random=False, balance=balance)
    expected = module.reference(exact_x - mean_H, exact_weight, capacity)
    sums = torch.cat([exact_x.sum(0), exact_x.new_tensor([100])]) + 1
    torch.testing.assert_close(balance.input_sum[0], sums.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.expert_T, expected.expert_T)
    for name in ("gate_T", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    for gating in (found, expected):
        (
            (gating.gate_T * torch.linspace(-1, 1, 100, device=DEVICE)).sum() + 3 * gating.aux_loss + gating.z_loss
        ).backward()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()  # NaN fails too


@pytest.mark.parametrize(("T", "H", "E"), [(100, 64, 8), (257, 80, 40), (5, 32, 1)])
def test_the_histogram_is_that_of_plain_torch(T, H, E):
    x, weight = inputs(T, H, E, torch.float32)
    balancer = QuantileBias(E, MoEConfig(num_experts=(E,), moe_router_load_balancing_type="quantile_balancing"))
    balancer.to(DEVICE).expert_bias.copy_(torch.linspace(-1, 1, E))
    histogram_REB = torch.zeros_like(balancer.statistics)
    for _ in range(2):  # it is added to
        module.gate(x, weight, None, random=False, balance=module.Balance(balancer.bias_E, None, histogram_REB))
        scores_TE = x.double() @ weight.double().T + balancer.bias_E
        balancer.observe(scores_TE, scores_TE.argmax(-1, keepdim=True))
    histogram_EB = histogram_REB.sum(0)
    assert histogram_EB.sum() == balancer.statistics.sum() == (0 if E == 1 else 2 * T * E)
    moved = (
        histogram_EB.cumsum(1) - balancer.statistics.sum(0).cumsum(1)
    ).abs()  # across the edge of a bin, by rounding
    assert moved.sum() <= 0.002 * 2 * T * E


def kept(T: int, E: int, capacity: int, seed: int) -> torch.Tensor:
    x, weight = inputs(T, 32, E, torch.float32)
    torch.manual_seed(seed)
    _, found = module.gate(x, weight, capacity, random=True)
    row_T = found.expert_T.long() * capacity + found.slot_T
    inside_T = found.slot_T < capacity
    assert torch.equal(found.token_R[row_T[inside_T]], torch.arange(T, device=DEVICE, dtype=torch.int32)[inside_T])
    assert int((found.token_R >= 0).sum()) == int(inside_T.sum()) == int(found.counts_E.clamp(max=capacity).sum())
    for expert in range(E):  # slots of an expert are 0, 1, 2 ...
        slots = found.slot_T[found.expert_T == expert].sort().values
        assert torch.equal(slots, torch.arange(len(slots), device=DEVICE, dtype=torch.int32))
    assert torch.equal(found.gate_T > 0, inside_T)
    return inside_T.cpu()


@pytest.mark.parametrize(("T", "E", "capacity"), [(64, 4, 6), (100, 4, 9), (33, 2, 5), (2, 2, 1), (300, 3, 40)])
def test_random_selection_keeps_as_many_as_there_is_room_for_and_repeats_with_the_seed(T, E, capacity):
    first, again, other = (kept(T, E, capacity, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    if T > 2:
        assert not torch.equal(first, other)


@pytest.mark.parametrize(("T", "E", "capacity"), [(64, 4, 6), (100, 4, 9), (300, 3, 40)])
def test_random_selection_keeps_the_tokens_that_plain_torch_keeps(T, E, capacity):
    """So that a run does not depend on whether its layout lets the kernels route."""
    x, weight = inputs(T, 32, E, torch.float32)
    torch.manual_seed(11)
    _, found = module.gate(x, weight, capacity, random=True)
    router = Router(32, E, MoEConfig(num_experts=(E,), moe_min_capacity=1)).to(DEVICE)
    router.weight = torch.nn.Parameter(weight)
    router.capacity = lambda tokens: capacity
    torch.manual_seed(11)
    plan, aux_loss, z_loss = router(x)
    assert torch.equal(plan.expert_TK[:, 0].int(), found.expert_T)
    assert torch.equal(plan.slot_TK[:, 0].int(), found.slot_T)
    torch.testing.assert_close(plan.gate_TK[:, 0], found.gate_T)
    torch.testing.assert_close(aux_loss, found.aux_loss)
    torch.testing.assert_close(z_loss, found.z_loss)


def test_random_selection_keeps_every_token_equally_often():
    T, E, capacity, draws = 60, 3, 8, 40
    x, weight = inputs(T, 32, E, torch.float32)
    expert_T = (x @ weight.T).argmax(-1).cpu()
    counts_E = torch.bincount(expert_T, minlength=E)
    kept_NT = torch.stack([kept(T, E, capacity, seed) for seed in range(draws)])
    share_T = kept_NT.double().mean(0)
    expected_T = (capacity / counts_E).clamp(max=1.0)[expert_T]
    spread_T = (expected_T * (1 - expected_T) / draws).sqrt()
    assert (share_T - expected_T).abs().max() <= 4.5 * spread_T.max()
    # and pairs are independent: two tokens of an over-full expert are kept together about as often as chance has it
    expert = int(counts_E.argmax())
    members = (expert_T == expert).nonzero()[:2, 0]
    together = float(kept_NT[:, members].all(1).double().mean())
    n = int(counts_E[expert])
    chance = capacity * (capacity - 1) / (n * (n - 1))
    assert abs(together - chance) <= 4.5 * (chance * (1 - chance) / draws) ** 0.5


def test_no_tokens():
    x, weight = inputs(0, 32, 4, torch.float32)
    x.requires_grad_()
    _, found = module.gate(x, weight, 4, random=True)
    assert found.counts_E.tolist() == [0] * 4
    assert found.aux_loss.item() == found.z_loss.item() == 0.0
    assert (found.token_R == -1).all()
    (found.aux_loss + found.gate_T.sum()).backward()
    assert x.grad.shape == (0, 32)


@pytest.mark.parametrize("shared", [232_448, 166_912, 101_376], ids=["Hopper", "A100", "others"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_cut_suits_the_shared_memory(itemsize, shared):
    """What is computed does not depend on it; only 1 024 experts in fp32 are too many, for GPUs with little of it."""
    for E in range(1, 1025):
        cut = module._tile(E, itemsize, shared)
        if cut is None:
            assert (itemsize, shared) == (4, 101_376)
            assert E > 512
            continue
        assert cut.BE >= E
        assert min(cut.BT, cut.BE, cut.BK) >= 16, "tl.dot needs as many"
        assert cut.BT * cut.BE <= 16384, "more would fill the registers"
    assert module._tile(1024, 2, shared) is not None


@pytest.mark.parametrize("cut", [(64, 16, 16, 4, 1), (16, 16, 32, 8, 2)], ids=str)
def test_every_cut_computes_the_same(monkeypatch, cut):
    (T, H, E), results = (70, 40, 5), []
    for cut_ in (None, module._Tile(*cut)):
        if cut_ is not None:
            monkeypatch.setattr(module, "_tile", lambda *_, cut_=cut_: cut_)
        x, weight = (t.requires_grad_() for t in inputs(T, H, E, torch.float32))
        _, found = module.gate(x, weight, 9, random=False)
        (found.gate_T.sum() + found.aux_loss + found.z_loss).backward()
        results.append([*found, x.grad, weight.grad])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
