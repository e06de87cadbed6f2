"""Parameter groups."""

import itertools

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig
from megatron.engine.optim.groups import parameter_groups
from megatron.model.gpt import GPTModel
from megatron.parallel.sharding import ParamLayout, collect_layouts


def test_one_after_the_other_all_but_odd_sizes_begin_at_multiples_of_16_bytes():
    """The gate between the parts of residual MoE has two biases, in each such layer."""
    model = GPTModel(
        ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=2, seq_length=8),
        MoEConfig(num_experts=(4,), mlp_type="residual"),
        vocab_size=32,
    ).bfloat16()
    odd = {name for name, p in model.named_parameters() if p.numel() % 8}
    assert len(odd) == 2
    names = {p: name for name, p in model.named_parameters()}
    seen = set()
    for group in parameter_groups(model, collect_layouts(model), OptimizerConfig(), MoEConfig()):
        sizes = [p.numel() * p.element_size() for p in group["params"]]
        for p, begin in zip(group["params"], itertools.accumulate(sizes, initial=0), strict=False):
            seen.add(names[p])
            assert begin % 16 == 0 or names[p] in odd, names[p]
    assert seen == set(names.values())


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    decay, no_decay = parameter_groups(model, collect_layouts(model), OptimizerConfig(weight_decay=0.1), MoEConfig())
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decay["params"]] == [torch.Size([8, 8])]
    assert len(no_decay["params"]) == 3


class OfManyDegrees(nn.Module):
    """Parameters of experts of several degrees, each a matrix and a bias, and others (degree 0)."""

    def __init__(self, degrees: tuple[int, ...]) -> None:
        super().__init__()
        self.degrees = degrees
        for degree in degrees:
            shape = (1, 3, 3) if degree else (3, 3)
            self.register_parameter(f"weight_{degree}", nn.Parameter(torch.zeros(shape)))
            self.register_parameter(f"bias_{degree}", nn.Parameter(torch.zeros(shape[:-1])))

    def param_layouts(self) -> dict[str, ParamLayout]:
        kinds = itertools.product(("weight", "bias"), filter(None, self.degrees))
        return {f"{kind}_{degree}": ParamLayout(expert_degree=degree) for kind, degree in kinds}


def test_groups_are_in_one_order_on_all_processes():
    for degrees in ((4, 0, 32, 2, 16, 8, 64), (64, 32, 16, 8, 4, 2, 0)):
        model = OfManyDegrees(degrees)
        groups = parameter_groups(model, collect_layouts(model), OptimizerConfig(), MoEConfig())
        found = [(group["expert_degree"], group["matrices"]) for group in groups]
        assert found == list(itertools.product((None, 2, 4, 8, 16, 32, 64), (True, False)))
        assert [group["weight_decay"] > 0 for group in groups] == [True, False] * len(degrees)


def test_routers_with_a_learning_rate_of_their_own_are_a_group():
    model = GPTModel(
        ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=2, seq_length=8),
        (moe := MoEConfig(num_experts=(4,), moe_router_lr_mult=0.3)),
        vocab_size=32,
    )
    groups = parameter_groups(model, collect_layouts(model), OptimizerConfig(weight_decay=0.1), moe)
    apart = [group for group in groups if group["lr_mult"] != 1.0]
    assert [(group["lr_mult"], group["weight_decay"], group["matrices"]) for group in apart] == [(0.3, 0.1, True)]
    assert {id(p) for p in apart[0]["params"]} == {id(model.layers[layer].mlp.router.weight) for layer in ("1", "3")}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
