"""MoE layers in bf16 on a GPU: every mode equals float64, and the host waits for nothing."""

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.moe import kernels
from megatron.moe.layer import MoELayer, MoEStats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
H, E, T = 512, 16, 4096
TOLERANCE = 2e-2  # of the norm of what is compared
MODEL = ModelConfig(num_layers=2, hidden_size=H, num_attention_heads=8, init_method_std=0.05)
EVERY_TOPK = pytest.mark.parametrize("topk", [1, 2, 4])
MODES = pytest.mark.parametrize("token_dropping", [True, False], ids=["capacity", "dropless"])


def make_layer(topk: int, token_dropping: bool) -> MoELayer:
    layer = MoELayer(MODEL, MoEConfig(num_experts=(E,), topk=topk, moe_token_dropping=token_dropping), E, seed=1)
    for bias in (layer.experts.b1, layer.experts.b2):
        torch.nn.init.normal_(bias, std=0.3)
    return layer.cuda().bfloat16()


def in_float64(layer: MoELayer, topk: int, token_dropping: bool) -> MoELayer:
    """The same values; kernels do not know float64, so this is plain torch."""
    exact = make_layer(topk, token_dropping).double()
    exact.load_state_dict(layer.state_dict())
    return exact


def run(layer: MoELayer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, MoEStats, torch.Tensor]:
    """Output, losses and counts, and the gradient of ``x``."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y, stats = layer(x)
    torch.autograd.backward([y, stats.aux_loss], [dy, torch.ones_like(stats.aux_loss)])
    return y, stats, x.grad


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@EVERY_TOPK
@MODES
def test_it_equals_float64(token_dropping, topk):
    layer = make_layer(topk, token_dropping)
    exact = in_float64(layer, topk, token_dropping)
    with torch.no_grad():  # nobody chooses the last expert
        for router in (layer.router, exact.router):
            router.weight[-1] = -router.weight[:-1].sum(0)
    common_H = 1.5 * layer.router.weight[:-1].sum(0).detach()
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16) + common_H
    dy = torch.randn_like(x)
    y, stats, dx = run(layer, x, dy)
    expected_y, expected, exact_dx = run(exact, x.double(), dy.double())
    assert torch.equal(stats.counts_E, expected.counts_E)
    assert torch.equal(stats.dropped, expected.dropped)
    assert stats.counts_E[-1] == 0
    assert relative_error(y, expected_y) <= TOLERANCE  # NaN fails too
    assert relative_error(dx, exact_dx) <= TOLERANCE
    assert relative_error(layer.router.weight.grad, exact.router.weight.grad) <= TOLERANCE
    for name, parameter in layer.experts.named_parameters():
        wanted = getattr(exact.experts, name).grad
        assert not parameter.grad[-1].any(), name
        for expert in (0, 3, E - 2):
            assert relative_error(parameter.grad[expert], wanted[expert]) <= TOLERANCE, f"{name} of {expert}"


@EVERY_TOPK
@MODES
def test_the_host_waits_for_nothing(token_dropping, topk):
    if not token_dropping and not kernels.groupable(torch.empty(0, dtype=torch.bfloat16, device="cuda"), H):
        pytest.skip("torch has no grouped product on this GPU")
    layer = make_layer(topk, token_dropping)
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    run(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_results_repeat_to_the_last_bit():
    layer = make_layer(2, False)
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    results = []
    for _ in range(2):
        layer.zero_grad()
        y, _, dx = run(layer, x, dy)
        results.append([y, dx, *(p.grad for p in layer.experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
