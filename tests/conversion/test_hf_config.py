"""config.json as transformers reads it: other names of a size, what is left out, and what contradicts itself."""

import dataclasses
import json
import sys

import pytest
from transformers import GPT2Config

from megatron.checkpoint import CheckpointError
from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.hf_config import from_hf, to_hf
from megatron.conversion.shards import read_json


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 99},
        {"n_embd": 64, "hidden_size": 64, "n_layer": 3, "n_head": 2, "n_positions": 99, "n_ctx": 99, "n_inner": 100},
        {"vocab_size": 125, "resid_pdrop": 0.0, "embd_pdrop": 0, "attn_pdrop": 0.2, "layer_norm_epsilon": 1e-6},
    ],
    ids=str,
)
def test_sizes_are_those_that_transformers_takes(content):
    theirs = GPT2Config.from_dict({"model_type": "gpt2"} | content)
    model, moe, rows = from_hf({"model_type": "gpt2"} | content, "config.json")
    assert not moe.enabled
    assert rows == theirs.vocab_size
    ours = (
        model.num_layers, model.hidden_size, model.num_attention_heads, model.ffn_hidden_size, model.position_rows,
        model.hidden_dropout, model.attention_dropout, model.layernorm_epsilon, model.init_method_std,
    )  # fmt: skip
    assert ours == (
        theirs.n_layer, theirs.n_embd, theirs.n_head, theirs.n_inner, theirs.n_positions,
        theirs.resid_pdrop, theirs.attn_pdrop, theirs.layer_norm_epsilon, theirs.initializer_range,
    )  # fmt: skip


def test_the_kind_may_stand_in_the_architecture_alone():
    assert from_hf({"architectures": ["GPT2LMHeadModel"], "n_layer": 2}, "config.json")[0].num_layers == 2
    with pytest.raises(CheckpointError, match="describes a None model; expected 'gpt2'"):
        from_hf({"architectures": ["LlamaForCausalLM"], "n_layer": 2}, "config.json")
    with pytest.raises(CheckpointError, match="describes a None model; expected 'gpt2'"):
        from_hf({"architectures": 5, "n_layer": 2}, "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"n_embd": 64, "hidden_size": 32}, "contradicts itself: n_embd 64 and hidden_size 32 are names of one size"),
        ({"n_positions": 64, "n_ctx": 32}, "contradicts itself: n_positions 64 and n_ctx 32"),
        ({"n_layer": "2"}, "n_layer is '2'; expected whole numbers"),
        ({"n_layer": True}, "n_layer is True; expected whole numbers"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; expected whole numbers"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None; expected numbers"),
        ({"resid_pdrop": "0.1", "embd_pdrop": "0.1"}, "resid_pdrop is '0.1'; expected numbers"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(CheckpointError, match=message):
        from_hf({"model_type": "gpt2"} | content, "config.json")


def test_a_model_with_experts_names_all_its_sizes():
    moe = MoEConfig(num_experts=(4,))
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=48)
    content = to_hf(model, moe, 128, {"eos_token_id": 121}, "float32")
    with pytest.raises(CheckpointError, match="intermediate_size is None; expected whole numbers"):
        from_hf({key: value for key, value in content.items() if key != "intermediate_size"}, "config.json")


@pytest.mark.parametrize("experts", [(1,), (4,)])
def test_normalized_queries_and_keys_are_of_our_class_alone(experts):
    moe = MoEConfig(num_experts=experts)
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=48, qk_layernorm=True)
    content = to_hf(model, moe, 128, {"eos_token_id": 121}, "float32")
    assert content["model_type"] == "gpt_moe"
    back, back_moe, _ = from_hf(content, "config.json")
    assert (back.qk_layernorm, back_moe.num_experts) == (True, experts)
    with pytest.raises(CheckpointError, match="qk_layernorm is 'yes'; expected true or false"):
        from_hf(content | {"qk_layernorm": "yes"}, "config.json")
    older = {key: value for key, value in content.items() if key != "qk_layernorm"}
    if moe.enabled:
        assert not from_hf(older, "config.json")[0].qk_layernorm
    else:  # without them it is a GPT-2, whose matrices are stored the other way round
        with pytest.raises(CheckpointError, match=r"experts_per_layer is \[1, 1\]; expected .* one above 1"):
            from_hf(older, "config.json")


def test_biases_of_experts_are_named():
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=48, qk_layernorm=True)
    moe = MoEConfig(num_experts=(4,), moe_router_load_balancing_type="quantile_balancing")
    content = to_hf(model, moe, 128, {"eos_token_id": 121}, "float32")
    assert (content["router_expert_bias"], content["router_aux_loss_coef"]) == (True, 0.01)
    assert from_hf(content, "config.json")[1].balancing == "quantile_balancing"
    older = {key: value for key, value in content.items() if key != "router_expert_bias"}
    assert from_hf(older, "config.json")[1].balancing == "aux_loss"
    with pytest.raises(CheckpointError, match="router_expert_bias is 1; expected true or false"):
        from_hf(content | {"router_expert_bias": 1}, "config.json")
    with pytest.raises(CheckpointError, match="router_expert_bias is true, but no layer has experts"):
        from_hf(content | {"experts_per_layer": [1, 1]}, "config.json")
    dense = dataclasses.replace(moe, num_experts=(1,))
    assert not to_hf(model, dense, 128, {"eos_token_id": 121}, "float32")["router_expert_bias"]


def test_a_dense_export_names_its_positions_for_llama_cpp_too():
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=48)
    content = to_hf(model, MoEConfig(), 128, {"eos_token_id": 121}, "float32")
    assert content["n_ctx"] == content["n_positions"] == 48


def test_a_deeply_nested_file_is_an_error_by_name(tmp_path):
    depth = 10 * sys.getrecursionlimit()
    (tmp_path / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*recursion"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="holds list; expected a JSON object"):
        read_json(tmp_path / "config.json")


def test_keys_of_an_exported_model_stay():
    """Code that was exported with it, and other programs, read them."""
    dense = to_hf(ModelConfig(), MoEConfig(), 512, {"eos_token_id": 1}, "float32")
    experts = to_hf(ModelConfig(), MoEConfig(num_experts=(4,)), 512, {"eos_token_id": 1}, "float32")
    shared = {
        "architectures", "model_type", "vocab_size", "embd_pdrop", "resid_pdrop", "attn_pdrop", "layer_norm_epsilon",
        "initializer_range", "eos_token_id", "tie_word_embeddings", "torch_dtype",
    }  # fmt: skip
    assert dense.keys() == shared | {
        "activation_function",
        "n_layer",
        "n_embd",
        "n_head",
        "n_inner",
        "n_positions",
        "n_ctx",
    }
    assert experts.keys() == shared | {
        "auto_map", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "experts_per_layer", "num_experts", "num_experts_per_tok", "residual_moe",
        "qk_layernorm", "router_expert_bias", "router_center_input", "router_aux_loss_coef", "router_z_loss_coef",
    }  # fmt: skip
    assert (experts["architectures"], experts["model_type"]) == (["GPTMoEForCausalLM"], "gpt_moe")
    assert experts["auto_map"] == {
        "AutoConfig": "configuration_gpt_moe.GPTMoEConfig",
        "AutoModel": "modeling_gpt_moe.GPTMoEModel",
        "AutoModelForCausalLM": "modeling_gpt_moe.GPTMoEForCausalLM",
    }
