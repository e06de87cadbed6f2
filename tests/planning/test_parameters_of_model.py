"""Counts of layers and ends add up to the parameters of the model as it is built."""

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel
from megatron.planning.parameters import count_parameters

SHAPE = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 24}


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        (ModelConfig(**SHAPE), MoEConfig()),
        (ModelConfig(**SHAPE, ffn_hidden_size=40, max_position_embeddings=50), MoEConfig(num_experts=(4,))),
        (ModelConfig(**SHAPE), MoEConfig(num_experts=(8,), expert_interval=1, topk=2)),
        (ModelConfig(**SHAPE), MoEConfig(num_experts=(2, 6), mlp_type="residual")),
        (ModelConfig(**SHAPE), MoEConfig(num_experts=(1, 6))),
    ],
)
def test_counts_equal_the_model(model, moe):
    with torch.device("meta"):
        parameters = dict(GPTModel(model, moe, vocab_size=128).named_parameters())
    count = count_parameters(model, moe, vocab_size=128)
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.expert == sum(p.numel() for name, p in parameters.items() if ".experts." in name)
