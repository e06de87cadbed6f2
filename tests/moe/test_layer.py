"""The whole layer on one process: gradients, determinism, shapes, precision, and no waiting for the device."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import ExpertGroup

H, E = 8, 4
ALONE = ExpertGroup(1, 0, None)
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=12, num_attention_heads=2, init_method_std=0.5)
EVERY_TOPK = pytest.mark.parametrize("topk", [1, 2, 3])
BOTH_MODES = pytest.mark.parametrize("token_dropping", [True, False], ids=["capacity", "dropless"])
BOTH_TYPES = pytest.mark.parametrize("mlp_type", ["standard", "residual"])


def make_layer(topk=1, token_dropping=True, group=ALONE, seed=0, layer=0, **moe) -> MoELayer:
    config = MoEConfig(num_experts=(E,), topk=topk, moe_token_dropping=token_dropping, moe_min_capacity=1, **moe)
    return MoELayer(MODEL, config, E, group, seed=seed, layer=layer)


def by_hand(layer: MoELayer, x_TH: torch.Tensor, topk: int) -> torch.Tensor:
    """The layer's output without any drop, token by token."""
    y_TH = []
    for x_H in x_TH:
        gate_E = (layer.router.weight @ x_H).softmax(0)
        best = gate_E.topk(topk)
        gates = best.values if topk == 1 else best.values / best.values.sum()
        y_H = 0
        for gate, e in zip(gates, best.indices, strict=True):
            h_F = torch.nn.functional.gelu(x_H @ layer.experts.w1[e] + layer.experts.b1[e], approximate="tanh")
            y_H = y_H + gate * (h_F @ layer.experts.w2[e] + layer.experts.b2[e])
        if layer.mlp is not None:
            c = layer.coefficient(x_H).softmax(0)
            y_H = c[0] * y_H + c[1] * layer.mlp(x_H)
        y_TH.append(y_H)
    return torch.stack(y_TH)


@EVERY_TOPK
@BOTH_MODES
@BOTH_TYPES
def test_equals_the_sum_over_experts_written_out(topk, token_dropping, mlp_type):
    layer = make_layer(topk, token_dropping, mlp_type=mlp_type, moe_train_capacity_factor=4.0)
    x = torch.randn(2, 10, H)
    y, stats = layer(x)
    torch.testing.assert_close(y, by_hand(layer, x.view(-1, H), topk).view(2, 10, H), rtol=1e-5, atol=1e-5)
    assert stats.dropped.item() == 0
    assert stats.counts_E.sum().item() == 20 * topk


@EVERY_TOPK
@BOTH_MODES
@BOTH_TYPES
def test_gradcheck(topk, token_dropping, mlp_type):
    """Analytic gradients of input, router and experts equal numerical ones in float64, with tokens dropped."""
    layer = make_layer(topk, token_dropping, mlp_type=mlp_type, moe_rts=False, moe_train_capacity_factor=0.8).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x_TH = torch.randn(6, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5

    def losses(x_TH, *values):
        y, stats = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x_TH,))
        return y, stats.aux_loss, stats.z_loss

    assert (layer(x_TH)[1].dropped > 0) == token_dropping
    inputs = (x_TH, *(p.detach().clone() for p in parameters))
    # fast_mode checks a random projection of the Jacobian.
    assert torch.autograd.gradcheck(losses, [i.requires_grad_() for i in inputs], fast_mode=True)


def test_the_output_alone_trains_the_router_of_top1():
    layer = make_layer()
    layer(torch.randn(20, H))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3


@EVERY_TOPK
@BOTH_MODES
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(topk, token_dropping, train, tokens):
    """One token at a time, as in generation, or none: fewer than experts and than the least capacity."""
    layer = make_layer(topk, token_dropping, moe_noise_policy="RSample").train(train)
    x = torch.randn(1, tokens, H, requires_grad=True)
    y, stats = layer(x)
    assert y.shape == (1, tokens, H)
    (y.sum() + stats.aux_loss + stats.z_loss).backward()
    assert x.grad.isfinite().all()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    if not train:
        torch.testing.assert_close(y[0], by_hand(layer, x[0], topk) if tokens else x[0], rtol=1e-5, atol=1e-5)


@EVERY_TOPK
def test_evaluation_is_deterministic_and_a_token_does_not_feel_the_others(topk):
    layer = make_layer(topk, moe_noise_policy="Jitter", moe_train_capacity_factor=0.5).eval()
    x = torch.randn(30, H) + 0.5
    together, stats = layer(x)
    assert torch.equal(together, layer(x)[0])
    assert stats.dropped.item() == 0
    alone = torch.cat([layer(x[t : t + 1])[0] for t in range(30)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_evaluation_with_a_capacity_drops():
    layer = make_layer(moe_eval_capacity_factor=0.5).eval()
    y, stats = layer(torch.randn(32, H) + 0.5)
    assert stats.dropped.item() == (stats.counts_E - 4).clamp(min=0).sum().item() > 0
    assert (y == 0).all(-1).sum() == stats.dropped


@pytest.mark.parametrize("noise", [None, "Jitter", "RSample"])
def test_what_is_random_in_training_follows_from_the_default_generator(noise):
    layer, x = make_layer(moe_noise_policy=noise), torch.randn(64, H) + 0.5
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@EVERY_TOPK
@BOTH_TYPES
@pytest.mark.parametrize("noise", [None, "Jitter", "RSample"])
def test_capacity_mode_has_static_shapes_and_never_reads_from_the_device(topk, mlp_type, noise):
    """Fake tensors have no values: reading one (item, nonzero, a mask as index) raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        layer = make_layer(topk, mlp_type=mlp_type, moe_noise_policy=noise)
        x = torch.randn(2, 16, H, requires_grad=True)
        y, stats = layer(x)
        (y.sum() + stats.aux_loss + stats.z_loss).backward()
        assert y.shape == x.grad.shape == (2, 16, H)
        assert stats.dropped.shape == ()


def test_the_test_above_would_notice_a_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        make_layer(token_dropping=False)(torch.randn(16, H))


@EVERY_TOPK
@BOTH_MODES
def test_bf16_stays_near_fp32(topk, token_dropping):
    """Same routing from the same bf16 values; outputs within 2 % of the largest, about 4 roundings of 2^-8."""
    low = make_layer(topk, token_dropping, moe_rts=False).bfloat16()
    exact = make_layer(topk, token_dropping, moe_rts=False)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    x = torch.randn(40, H).bfloat16()
    y, stats = low(x)
    expected_y, expected = exact(x.float())
    assert y.dtype == torch.bfloat16
    assert stats.aux_loss.dtype == stats.z_loss.dtype == torch.float32
    assert torch.equal(stats.counts_E, expected.counts_E)
    torch.testing.assert_close(stats.aux_loss, expected.aux_loss)
    torch.testing.assert_close(stats.z_loss, expected.z_loss)
    scale = expected_y.abs().max().item()
    torch.testing.assert_close(y.float(), expected_y, rtol=0, atol=0.02 * scale)
    y.sum().backward()
    expected_y.sum().backward()
    for (name, a), b in zip(low.named_parameters(), exact.parameters(), strict=True):
        assert a.grad.dtype == torch.bfloat16
        atol = 0.03 * b.grad.abs().max().item()
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_a_dropped_token_gets_nothing_and_gives_no_gradient():
    layer = make_layer(moe_rts=False, moe_train_capacity_factor=0.25)
    x = torch.randn(32, H, requires_grad=True)
    y, stats = layer(x)
    lost = (y == 0).all(-1)
    assert lost.sum() == stats.dropped > 0
    y.square().sum().backward()
    assert torch.equal((x.grad == 0).all(-1), lost)


def test_values_that_are_not_finite_pass_through_to_the_losses():
    """The trainer skips such a step; the layer must not crash before it can."""
    for token_dropping in (True, False):
        x = torch.randn(10, H)
        x[3] = torch.nan
        y, stats = make_layer(2, token_dropping)(x)
        assert stats.aux_loss.isnan()
        assert y[3].isnan().all()
        assert stats.counts_E.sum().item() == 20


def test_initial_values_follow_from_seed_and_layer_only():
    layer = make_layer(mlp_type="residual")
    torch.manual_seed(99)
    same = make_layer(mlp_type="residual")
    halves = [make_layer(mlp_type="residual", group=ExpertGroup(2, rank, None)) for rank in range(2)]
    others = [make_layer(mlp_type="residual", seed=1), make_layer(mlp_type="residual", layer=1)]
    for name, value in layer.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        pieces = [half.state_dict()[name] for half in halves]
        assert torch.equal(value, torch.cat(pieces) if name.startswith("experts.") else pieces[0])
        for other in others:
            assert torch.equal(value, other.state_dict()[name]) == (name.split(".")[-1] in ("b1", "b2", "bias"))


def test_parameter_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_layer(group=ExpertGroup(2, 1, None)).named_parameters()}
    assert shapes == {
        "router.weight": (4, 8),
        "experts.w1": (2, 8, 12),
        "experts.b1": (2, 12),
        "experts.w2": (2, 12, 8),
        "experts.b2": (2, 8),
    }
    residual = make_layer(mlp_type="residual").state_dict().keys() - shapes.keys()
    assert residual == {
        f"{name}.{kind}" for name in ("mlp.fc1", "mlp.fc2", "coefficient") for kind in ("weight", "bias")
    }


def test_on_the_meta_device_it_has_shapes_but_no_memory():
    with torch.device("meta"):
        layer = MoELayer(dataclasses.replace(MODEL, hidden_size=4096), MoEConfig(num_experts=(1024,)), 1024)
    assert all(p.is_meta for p in layer.parameters())
