"""Parameter counts against the publication and against GPT-2."""

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.planning.parameters import count_parameters


def count_preset(name: str):
    config = build(PRESETS[name])
    return count_parameters(config.model, config.moe, config.model.padded_vocab_size(50257))


@pytest.mark.parametrize(("name", "billions"), [("350M+MoE-128", 13), ("1.3B+MoE-128", 52)])
def test_published_totals(name, billions):
    assert round(count_preset(name).total / 1e9) == billions


@pytest.mark.parametrize(("moe", "dense"), [("350M+MoE-128", "350M"), ("1.3B+MoE-128", "1.3B")])
def test_top1_moe_activates_its_dense_model_and_the_routers(moe, dense):
    hidden = PRESETS[dense]["hidden_size"]
    assert count_preset(moe).active == count_preset(dense).total + 12 * 128 * hidden


def test_gpt2_small_equals_hugging_face():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    theirs = sum(p.numel() for p in gpt2.parameters())
    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)
    ours = count_parameters(model, MoEConfig(), vocab_size=50257)
    assert ours.total == theirs == 124_439_808
    assert (ours.active, ours.expert, ours.dense) == (ours.total, 0, ours.total)


def test_parts_of_a_small_moe_by_hand():
    model = ModelConfig(num_layers=2, hidden_size=4, num_attention_heads=1, ffn_hidden_size=6, seq_length=5)
    expert = 4 * 6 + 6 + 6 * 4 + 4
    outside = (7 + 5) * 4 + 2 * (4 * 4 + 4 * 4 * 4 + 4 * 4) + expert + 2 * 4  # the first layer's feed-forward is dense
    router = 3 * 4
    standard = count_parameters(model, MoEConfig(num_experts=(3,), topk=2), 7)
    assert (standard.total, standard.expert) == (outside + router + 3 * expert, 3 * expert)
    assert standard.active == outside + router + 2 * expert
    residual = count_parameters(model, MoEConfig(num_experts=(3,), topk=2, mlp_type="residual"), 7)
    assert residual.total - standard.total == residual.active - standard.active == expert + 4 * 2 + 2


def test_a_pyramid_counts_each_layer_by_its_own_experts():
    model = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2, seq_length=16)
    pyramid = count_parameters(model, MoEConfig(num_experts=(2, 6)), 100)
    even = count_parameters(model, MoEConfig(num_experts=(4,)), 100)
    assert pyramid == even
