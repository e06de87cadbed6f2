"""With the same weights, the layer computes what deepspeed.moe.layer.MoE does: outputs, losses and every gradient.

Top-1 without random token selection needs a word. DeepSpeed lets ``torch.topk`` pick which tokens an over-full expert
keeps, among equals, and topk does not say which of equals it takes (on a CPU it is not the first). So there are two
tests: one makes its topk take the first of equals and compares everything; one leaves it alone and compares what is
defined, which is the counts and the output of tokens that both keep.
"""

import warnings

import pytest
import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.layer import MoELayer

H, F, T = 16, 24, 70
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=F, num_attention_heads=2, init_method_std=0.3)


def make_layers(experts: int, residual: bool = False, **moe) -> tuple[MoELayer, nn.Module]:
    """Ours with random weights and biases, and DeepSpeed's with the same ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.moe.layer import MoE

    config = MoEConfig(num_experts=(experts,), mlp_type="residual" if residual else "standard", **moe)
    ours = MoELayer(MODEL, config, experts)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.split(".")[-1] in ("b1", "b2", "bias"):
                parameter.normal_()
    feed_forward = nn.Sequential(nn.Linear(H, F), nn.GELU(approximate="tanh"), nn.Linear(F, H))
    theirs = MoE(
        H,
        feed_forward,
        num_experts=experts,
        k=config.topk,
        capacity_factor=config.moe_train_capacity_factor,
        eval_capacity_factor=config.moe_eval_capacity_factor or 1.0,
        min_capacity=config.moe_min_capacity,
        use_residual=residual,
        drop_tokens=config.moe_token_dropping,
        use_rts=config.moe_rts,
        top2_2nd_expert_sampling=False,
    )
    with torch.no_grad():
        for (_, theirs_p), (_, ours_p) in zip(named(theirs, experts), named(ours, experts), strict=True):
            theirs_p.copy_(ours_p)
    return ours, theirs


def named(layer: nn.Module, experts: int, grad: bool = False) -> list[tuple[str, torch.Tensor | None]]:
    """Parameters, or their gradients, of either layer in one order and in torch.nn.Linear's layout [out, in]."""
    pick = (lambda p: p.grad) if grad else (lambda p: p.data)
    if isinstance(layer, MoELayer):
        pairs = [("router", pick(layer.router.weight))]
        for e in range(experts):
            w1, b1, w2, b2 = (pick(getattr(layer.experts, name))[e] for name in ("w1", "b1", "w2", "b2"))
            pairs += [(f"expert {e} w1", w1.T), (f"expert {e} b1", b1)]
            pairs += [(f"expert {e} w2", w2.T), (f"expert {e} b2", b2)]
        dense = [] if layer.mlp is None else [layer.mlp.fc1, layer.mlp.fc2, layer.coefficient]
    else:
        pairs = [("router", pick(layer.deepspeed_moe.gate.wg.weight))]
        for e, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            for name, linear in (("1", expert[0]), ("2", expert[2])):
                pairs += [(f"expert {e} w{name}", pick(linear.weight)), (f"expert {e} b{name}", pick(linear.bias))]
        dense = [layer.mlp[0], layer.mlp[2], layer.coefficient] if layer.use_residual else []
    for name, linear in zip(("fc1", "fc2", "coefficient"), dense, strict=False):
        pairs += [(f"{name}.weight", pick(linear.weight)), (f"{name}.bias", pick(linear.bias))]
    return pairs


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Two sequences whose tokens favour some experts over others."""
    return (torch.randn(2, T // 2, H, generator=torch.Generator().manual_seed(2)) + 0.4).to(dtype)


def run(layer: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, aux loss, counts and the input's gradient, after a backward pass through a mean and the aux loss."""
    x = tokens(dtype).requires_grad_()
    y, *rest = layer(x)
    aux, counts = (rest[0].aux_loss, rest[0].counts_E) if isinstance(layer, MoELayer) else rest
    target = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
    (((y - target) ** 2).sum(-1).mean() + 3 * aux).backward()
    return {"output": y.detach(), "aux loss": aux.detach(), "counts": counts, "input gradient": x.grad}


def assert_near(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = 1e-6 if a.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda message: f"{name}: {message}")


def assert_equal(experts: int, ours: MoELayer, theirs: nn.Module, monkeypatch) -> None:
    """In fp32 to 1e-6; and in float64 to 1e-12, which no difference of meaning would pass."""
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # DeepSpeed's gate knows fp32 only
            for layer in (ours.double(), theirs.double()):
                layer.zero_grad()
        mine, other = run(ours, dtype), run(theirs, dtype)
        assert torch.equal(mine.pop("counts"), other.pop("counts"))
        for name, value in mine.items():
            assert_near(name, value, other[name])
        gradients = zip(named(ours, experts, grad=True), named(theirs, experts, grad=True), strict=True)
        for (name, value), (their_name, their_value) in gradients:
            assert name == their_name
            # An expert that got no token has gradient None there and 0 here.
            assert_near(f"gradient of {name}", value, torch.zeros_like(value) if their_value is None else their_value)


def first_of_equals(values, k, dim=-1, sorted=True):
    """torch.topk that takes the first of equals."""
    order = values.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((order.values.narrow(dim, 0, int(k)), order.indices.narrow(dim, 0, int(k))))


@pytest.mark.parametrize("residual", [False, True], ids=["standard", "residual"])
@pytest.mark.parametrize("dropless", [False, True], ids=["capacity", "dropless"])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_equals_deepspeed(topk, dropless, residual, monkeypatch):
    monkeypatch.setattr(torch, "topk", first_of_equals)
    ours, theirs = make_layers(8, residual, topk=topk, moe_token_dropping=not dropless, moe_rts=False)
    dropped = ours(tokens(torch.float32))[1].dropped
    assert (dropped == 0) if dropless else (dropped > 5), (
        "with a capacity, some must be dropped for the test to mean it"
    )
    assert_equal(8, ours, theirs, monkeypatch)


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(("factor", "least"), [(0.3, 1), (2.0, 1), (0.1, 9)])
def test_equals_deepspeed_at_other_capacities(topk, factor, least, monkeypatch):
    monkeypatch.setattr(torch, "topk", first_of_equals)
    settings = {"moe_train_capacity_factor": factor, "moe_min_capacity": least}
    ours, theirs = make_layers(4, topk=topk, moe_rts=False, **settings)
    assert_equal(4, ours, theirs, monkeypatch)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_equals_deepspeed_in_evaluation_with_a_capacity(topk, monkeypatch):
    monkeypatch.setattr(torch, "topk", first_of_equals)
    ours, theirs = make_layers(8, topk=topk, moe_eval_capacity_factor=0.7, moe_rts=False)
    assert_equal(8, ours.eval(), theirs.eval(), monkeypatch)


@pytest.mark.parametrize("rts", [False, True])
def test_top1_equals_deepspeed_for_the_tokens_that_both_keep(rts):
    ours, theirs = make_layers(8, moe_rts=rts)
    torch.manual_seed(3)
    mine, other = run(ours, torch.float32), run(theirs, torch.float32)
    assert torch.equal(mine["counts"], other["counts"])
    assert_near("aux loss", mine["aux loss"], other["aux loss"])
    mine, other = mine["output"].view(T, H), other["output"].view(T, H)
    kept, their_kept = (mine != 0).any(-1), (other != 0).any(-1)
    assert kept.sum() == their_kept.sum() < T
    assert not torch.equal(kept, their_kept), "the choice among equals differs, or the whole output could be compared"
    both = kept & their_kept
    assert both.sum() > T // 2
    assert_near("output of the tokens that both keep", mine[both], other[both])
