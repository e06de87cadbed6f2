"""The layer with everything that kernels can do in kernels equals plain torch in float64.

On a GPU, or in Triton's interpreter, where nobody would choose them otherwise.
"""

import copy
from unittest.mock import Mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from megatron.config import ModelConfig, MoEConfig
from megatron.moe import kernels, torch_ops, triton_ops
from megatron.moe.balancing import learn, learned_buffers, learners
from megatron.moe.layer import MoELayer, MoEStats
from megatron.moe.plan import RoutingPlan
from megatron.parallel.groups import ALONE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}
H, E = 16, 4
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=24, num_attention_heads=2, init_method_std=0.3)
EVERY_TOPK = pytest.mark.parametrize("topk", [1, 2, 3])
MODES = pytest.mark.parametrize("mode", ["capacity", "dropless"])
SETTINGS = {"capacity": {"moe_train_capacity_factor": 0.75}, "dropless": {"moe_token_dropping": False}}


@pytest.fixture(autouse=True)
def _kernels_on_any_device(monkeypatch):
    monkeypatch.setattr(kernels, "_usable_on", lambda device: True)


def make_layer(topk: int, mode: str, dtype: torch.dtype, **moe) -> MoELayer:
    config = MoEConfig(num_experts=(E,), topk=topk, moe_min_capacity=1, **SETTINGS[mode], **moe)
    layer = MoELayer(MODEL, config, E, seed=1)
    for bias in (layer.experts.b1, layer.experts.b2):
        torch.nn.init.normal_(bias, std=0.3)
    return layer.to(DEVICE, dtype)


def run(
    layer: MoELayer, x: torch.Tensor, dy: torch.Tensor, *, recompute: bool = False
) -> tuple[torch.Tensor, MoEStats, dict[str, torch.Tensor]]:
    """Output, losses and counts, and every gradient."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # random token selection
    y, stats = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    ((y * dy).sum() + stats.aux_loss + 0.1 * stats.z_loss).backward()
    return y, stats, {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}


def assert_equal_to_float64(layer: MoELayer, x: torch.Tensor) -> MoEStats:
    dtype, dy = x.dtype, torch.randn_like(x)
    exact = copy.deepcopy(layer).double()  # float64 is for plain torch only
    y, stats, gradients = run(layer, x, dy)
    expected_y, expected, exact_gradients = run(exact, x.double(), dy.double())
    assert y.dtype == dtype
    assert torch.equal(stats.counts_E, expected.counts_E)
    assert torch.equal(stats.dropped, expected.dropped)
    assert y.shape == x.shape
    pairs = {name: (gradient, exact_gradients[name]) for name, gradient in gradients.items()}
    pairs |= {name: (getattr(stats, name), getattr(expected, name)) for name in ("aux_loss", "z_loss")}
    pairs["y"] = y, expected_y
    for name, (a, b) in pairs.items():
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm(), name  # NaN fails too
    return stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TOPK
@MODES
def test_the_layer_and_all_gradients_are_those_of_float64(mode, topk, dtype, monkeypatch):
    layer = make_layer(topk, mode, dtype)
    x = (torch.randn(2, 15, H, device=DEVICE) + 0.3).to(dtype)
    plain_torch = Mock(side_effect=AssertionError("this ran in plain torch"))
    with monkeypatch.context() as forbid:
        forbid.setattr(torch_ops, "permutation", plain_torch)
        forbid.setattr(torch_ops, "expert_mlp", plain_torch)
        if kernels.groupable(x, H, 24):
            forbid.setattr(torch_ops, "expert_mlp_sorted", plain_torch)
        if topk == 1:
            forbid.setattr(torch_ops, "route", plain_torch)
        layer(x)
    stats = assert_equal_to_float64(layer, x)
    assert bool(stats.dropped) == (mode == "capacity")


BALANCING = [
    {"moe_router_load_balancing_type": "quantile_balancing", "moe_router_center_input": True},
    {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True},
    {"moe_router_load_balancing_type": "global_aux_loss"},
]


@pytest.mark.parametrize("options", BALANCING, ids=["quantile, centered", "bias", "global"])
@MODES
def test_what_routers_learn_and_how_they_use_it(mode, options):
    layer = make_layer(1, mode, torch.float32, **options)
    for scale in (0.0, 1.0):  # the first update is without biases
        learn(learners(layer), None, ALONE, finite=True)
        layer.zero_grad()
        x = torch.randn(60, H, device=DEVICE) + scale
        exact = copy.deepcopy(layer).double()
        assert_equal_to_float64(layer, x)
        exact(x.double())
        learn([*learners(layer)], None, ALONE, finite=True)
        learn([*learners(exact)], None, ALONE, finite=True)
        for name, expected in learned_buffers(exact).items():
            torch.testing.assert_close(learned_buffers(layer)[name], expected, atol=0.02, rtol=0.02)  # a bin's width


@EVERY_TOPK
@MODES
def test_recomputed_activations_give_the_same_gradients(mode, topk):
    layer = make_layer(topk, mode, torch.float32)
    x, dy = (torch.randn(15, H, device=DEVICE) for _ in range(2))
    _, _, expected = run(layer, x, dy)
    layer.zero_grad()
    y, _, gradients = run(layer, x, dy, recompute=True)
    assert y.requires_grad
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@MODES
def test_the_residual_form_with_noise(mode):
    layer = make_layer(2, mode, torch.float32, mlp_type="residual")
    assert_equal_to_float64(layer, torch.randn(30, H, device=DEVICE))


@EVERY_TOPK
def test_an_expert_without_tokens_gets_gradients_of_zero(topk):
    layer = make_layer(topk, "dropless", torch.float32)
    with torch.no_grad():
        layer.router.weight[2] = -10 * layer.router.weight[0].abs()
        layer.router.weight[:2].abs_()
    x = torch.rand(40, H, device=DEVICE)
    stats = assert_equal_to_float64(layer, x)
    assert stats.counts_E[2] == 0 or topk == 3
    if topk < 3:
        assert not layer.experts.w1.grad[2].any()


def test_rows_that_cannot_be_grouped_go_through_the_loop():
    """Of 12 inner units of 2 bytes each, a line does not begin at a multiple of 16 bytes."""
    config = MoEConfig(num_experts=(E,), moe_token_dropping=False)
    model = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=12, num_attention_heads=2, init_method_std=0.3)
    layer = MoELayer(model, config, E).to(DEVICE, torch.float16)
    x = torch.randn(20, H, device=DEVICE).half()
    assert layer.operations[True].of("expert_mlp_sorted", x, layer.experts.w1) is torch_ops
    assert_equal_to_float64(layer, x)


@EVERY_TOPK
@MODES
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(topk, mode, tokens):
    layer = make_layer(topk, mode, torch.float32)
    x = torch.randn(1, tokens, H, device=DEVICE, requires_grad=True)
    y, stats = layer(x)
    (y.sum() + stats.aux_loss).backward()
    assert y.shape == x.shape
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()


def test_the_kernels_plan_knows_how_many_were_dropped():
    layer = make_layer(1, "capacity", torch.float32)
    x = torch.randn(50, H, device=DEVICE)
    for routing in (triton_ops.route(layer.router, x), triton_ops.top1_layer(layer.router, layer.experts, x)[1]):
        plan = routing.plan
        assert plan.known_dropped is not None
        counted = RoutingPlan(plan.expert_TK, plan.gate_TK, plan.slot_TK, plan.counts_E, plan.capacity)
        assert torch.equal(plan.dropped, counted.dropped)
        assert plan.dropped > 0


def test_plain_torch_routes_where_shared_memory_is_too_small(monkeypatch):
    from megatron.moe.kernels import gate

    layer = make_layer(1, "capacity", torch.float32)
    x = torch.randn(1, 24, H, device=DEVICE)
    operations, weight_EH = layer.operations[True], layer.router.weight
    assert operations.of("route", x, weight_EH) is triton_ops
    assert operations.top1_layer(x, weight_EH, layer.experts.w1) is triton_ops.top1_layer
    monkeypatch.setattr(gate, "_shared_memory", lambda device: 4096)
    assert operations.of("route", x, weight_EH) is torch_ops
    assert operations.top1_layer(x, weight_EH, layer.experts.w1) is None
    assert_equal_to_float64(layer, x)
