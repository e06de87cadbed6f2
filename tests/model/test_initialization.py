import math

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel
from megatron.moe.initialization import named_generator

WIDE = ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4, seq_length=256, init_method_std=0.014)
EXPERTS = MoEConfig(num_experts=(4,))


def parameters(model: ModelConfig = WIDE, moe: MoEConfig = EXPERTS, seed: int = 3) -> dict[str, torch.Tensor]:
    return dict(GPTModel(model, moe, 512, seed=seed).named_parameters())


@pytest.mark.parametrize("moe", [MoEConfig(), EXPERTS], ids=["dense", "moe"])
def test_spread_of_the_initial_values(moe):
    for name, parameter in parameters(moe=moe).items():
        if name.endswith(("bias", "b1", "b2")):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert (parameter == 1).all(), name
        else:
            output = name.endswith(("attention.dense.weight", "mlp.fc2.weight", "experts.w2"))
            expected = 0.014 / math.sqrt(8) if output else 0.014
            # five standard errors of a sample's standard deviation and mean
            error = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.detach().std().item() == pytest.approx(expected, rel=error), name
            assert abs(parameter.detach().mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_values_follow_from_the_seed_and_nothing_else():
    torch.manual_seed(1)
    first = parameters()
    torch.manual_seed(2)
    torch.randn(7)
    torch.testing.assert_close(parameters(), first, rtol=0, atol=0)
    other = parameters(seed=4)
    drawn = [name for name, value in first.items() if value.unique().numel() > 1]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_values_of_a_parameter_do_not_depend_on_the_other_parameters():
    """The layers that a dense and an MoE model share start equal, and so do those of a deeper model."""
    both, dense = parameters(), parameters(moe=MoEConfig())
    shared = both.keys() & dense.keys()
    assert "layers.3.attention.qkv.weight" in shared
    torch.testing.assert_close({n: both[n] for n in shared}, {n: dense[n] for n in shared}, rtol=0, atol=0)


def test_no_two_parameters_are_alike():
    values = {}
    for name, value in parameters().items():
        if value.unique().numel() > 1:
            first = tuple((value.flatten()[:8] / value.std()).round(decimals=3).tolist())
            assert first not in values, (name, values[first])
            values[first] = name


def test_generators_of_names_and_seeds_differ():
    draws = {float(torch.rand((), generator=named_generator(s, n))) for s in (0, 1, -1) for n in ("a", "b", "1/a")}
    assert len(draws) == 9


@pytest.mark.parametrize(
    ("layers", "hidden", "experts", "billions"),
    [(24, 1024, 1, 0.356), (24, 1024, 128, 13), (24, 2048, 128, 52), (32, 4096, 1, 6.7)],
)
def test_parameters_are_counted_without_memory(layers, hidden, experts, billions):
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=16)
    with torch.device("meta"):
        gpt = GPTModel(model, MoEConfig(num_experts=(experts,)), 50304)
    assert all(parameter.is_meta for parameter in gpt.parameters())
    count = sum(parameter.numel() for parameter in gpt.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.02)
