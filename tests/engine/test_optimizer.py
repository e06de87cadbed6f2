"""Parameter groups of AdamW."""

import itertools

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig
from megatron.engine.optimizer import build_adam
from megatron.model.gpt import GPTModel


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
    for group in build_adam(model, OptimizerConfig()).param_groups:
        sizes = [p.numel() * p.element_size() for p in group["params"]]
        for p, begin in zip(group["params"], itertools.accumulate(sizes, initial=0), strict=False):
            seen.add(names[p])
            assert begin % 16 == 0 or names[p] in odd, names[p]
    assert seen == set(names.values())


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    decay, no_decay = build_adam(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decay["params"]] == [torch.Size([8, 8])]
    assert len(no_decay["params"]) == 3
