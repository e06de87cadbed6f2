"""Stacked feed-forwards: their values, their initial values, and what marks them."""

import math

import pytest
import torch

from megatron.config import ModelConfig
from megatron.moe.experts import Experts
from megatron.moe.mlp import MLP
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.sharding import ParamLayout, Shard

ALONE = ExpertGroup(1, 0, None)


def make_experts(num_experts=4, group=ALONE, hidden=8, ffn=16, seed=0, layer=0) -> Experts:
    experts = Experts(hidden, ffn, num_experts, group)
    experts.initialize(0.02, 0.01, seed, layer)
    return experts


def as_mlps(experts: Experts) -> list[MLP]:
    """The same experts as dense feed-forwards."""
    mlps = []
    for w1, b1, w2, b2 in zip(experts.w1, experts.b1, experts.w2, experts.b2, strict=True):
        mlp = MLP(ModelConfig(hidden_size=w1.size(0), ffn_hidden_size=w1.size(1)))
        mlp.load_state_dict({"fc1.weight": w1.T, "fc1.bias": b1, "fc2.weight": w2.T, "fc2.bias": b2})
        mlps.append(mlp)
    return mlps


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    experts = make_experts()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_equally_many_rows_for_each_expert(experts):
    x_LCH = torch.randn(4, 5, 8)
    expected = torch.stack([mlp(x) for mlp, x in zip(as_mlps(experts), x_LCH, strict=True)])
    torch.testing.assert_close(experts(x_LCH), expected)


@pytest.mark.parametrize("rows", [[3, 0, 1, 6], [0, 0, 0, 2], [1, 1, 1, 1]])
def test_sorted_rows(experts, rows):
    x_RH = torch.randn(sum(rows), 8)
    expected = torch.cat([mlp(x) for mlp, x in zip(as_mlps(experts), x_RH.split(rows), strict=True)])
    torch.testing.assert_close(experts.forward_sorted(x_RH, torch.tensor(rows)), expected)


def test_without_rows_every_gradient_is_zero_not_none(experts):
    output = experts.forward_sorted(torch.empty(0, 8), torch.zeros(4, dtype=torch.int64))
    assert output.shape == (0, 8)
    output.sum().backward()
    for parameter in experts.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_initial_values_have_the_asked_scale_and_differ_between_experts_layers_and_seeds():
    experts = make_experts(hidden=32, ffn=128)
    assert math.isclose(experts.w1.std().item(), 0.02, rel_tol=0.02)
    assert math.isclose(experts.w2.std().item(), 0.01, rel_tol=0.02)
    assert not experts.b1.any()
    assert not experts.b2.any()
    drawn = [*experts.w1, *experts.w2.mT]
    for other in (make_experts(hidden=32, ffn=128, seed=1), make_experts(hidden=32, ffn=128, layer=1)):
        drawn += [*other.w1, *other.w2.mT]
    directions = torch.nn.functional.normalize(torch.stack([w.flatten() for w in drawn]), dim=1)
    correlation = directions @ directions.T - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.1  # 4096 independent values: standard deviation 1/64


@pytest.mark.parametrize("size", [2, 4])
def test_initial_values_do_not_depend_on_how_many_processes_share_them(size):
    whole = make_experts()
    parts = [make_experts(group=ExpertGroup(size, rank, None)) for rank in range(size)]
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), parameter)


def test_layouts_say_that_parameters_are_experts():
    experts = make_experts(group=ExpertGroup(2, 1, None))
    assert experts.param_layouts().keys() == dict(experts.named_parameters()).keys()
    for layout in experts.param_layouts().values():
        assert layout == ParamLayout((Shard(0, 2, 1),), expert_degree=2)


def test_processes_must_divide_the_experts():
    with pytest.raises(ValueError, match="6 experts cannot be spread evenly over 4 processes"):
        make_experts(6, ExpertGroup(4, 0, None))
