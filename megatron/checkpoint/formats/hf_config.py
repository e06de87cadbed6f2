"""The configuration of a model as Hugging Face's libraries keep it (config.json), from ours and back."""

from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config import ModelConfig, MoEConfig

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of GELU's tanh form
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def experts_per_layer(model: ModelConfig, moe: MoEConfig) -> list[int]:
    """Experts of each layer; 1 for a dense one."""
    return [moe.experts_of_layer(layer) for layer in range(model.num_layers)]


def to_hf(model: ModelConfig, moe: MoEConfig, vocab_size: int, eod: int, dtype: str) -> dict[str, Any]:
    """The content of config.json: stock GPT-2, or the configuration class in ``hf_moe`` for a model with experts."""
    shared = {
        "vocab_size": vocab_size,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if not moe.enabled:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": ACTIVATIONS[0],
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "n_positions": model.position_rows,
            **shared,
        }
    return {
        "architectures": ["GPTMoEForCausalLM"],
        "model_type": "gpt_moe",
        "auto_map": {
            "AutoConfig": "configuration_gpt_moe.GPTMoEConfig",
            "AutoModel": "modeling_gpt_moe.GPTMoEModel",
            "AutoModelForCausalLM": "modeling_gpt_moe.GPTMoEForCausalLM",
        },
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.position_rows,
        "experts_per_layer": experts_per_layer(model, moe),
        "num_experts": max(experts_per_layer(model, moe)),
        "num_experts_per_tok": moe.topk,
        "residual_moe": moe.mlp_type == "residual",
        "router_aux_loss_coef": moe.moe_loss_coeff,
        "router_z_loss_coef": moe.moe_z_loss_coeff,
        **shared,
    }


def from_hf(content: dict[str, Any], where: str) -> tuple[ModelConfig, MoEConfig, int]:
    """Our configuration of a config.json, and the rows of its token table.

    Raises:
        CheckpointError: it describes a model that this code does not have; what differs is named.
    """
    kind = content.get("model_type")
    if kind not in ("gpt2", "gpt_moe"):
        raise CheckpointError(
            f"{where} describes a {kind!r} model; expected 'gpt2' or 'gpt_moe' (an export of this program)"
        )
    differences = [
        f"{key} is {content[key]!r}, expected {expected}"
        for key, allowed, expected in (
            ("activation_function", ACTIVATIONS, "GELU's tanh form, 'gelu_new'"),
            ("scale_attn_weights", (True,), "true"),
            ("scale_attn_by_inverse_layer_idx", (False,), "false"),
            ("add_cross_attention", (False,), "false"),
            ("tie_word_embeddings", (True,), "true"),
        )
        if key in content and content[key] not in allowed
    ]
    if content.get("embd_pdrop", 0.1) != content.get("resid_pdrop", 0.1):
        differences.append("embd_pdrop and resid_pdrop differ, which are one option here (--hidden-dropout)")
    if differences:
        raise CheckpointError(f"{where} describes a GPT that this program does not have: {'; '.join(differences)}")
    dense = kind == "gpt2"
    names = (
        ("n_layer", "n_embd", "n_head", "n_inner", "n_positions")
        if dense
        else ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    )
    numbers = {name: content.get(name) for name in (*names, "vocab_size")}
    numbers["num_experts_per_tok"] = content.get("num_experts_per_tok", 1)
    wrong = [
        f"{name} is {value!r}"
        for name, value in numbers.items()
        if not isinstance(value, int) and (name, value) != ("n_inner", None)
    ]
    if wrong:
        raise CheckpointError(f"{where}: {', '.join(wrong)}; expected whole numbers. Restore the file")
    layers, hidden, heads, ffn, positions = (content.get(name) for name in names)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        seq_length=positions,
        make_vocab_size_divisible_by=1,
        init_method_std=content.get("initializer_range", 0.02),
        hidden_dropout=content.get("resid_pdrop", 0.1),
        attention_dropout=content.get("attn_pdrop", 0.1),
        layernorm_epsilon=content.get("layer_norm_epsilon", 1e-5),
    )
    moe = MoEConfig() if dense else _experts(content, where)
    return model, moe, content["vocab_size"]


def _experts(content: dict[str, Any], where: str) -> MoEConfig:
    experts = content.get("experts_per_layer")
    numbers = isinstance(experts, list) and all(isinstance(count, int) for count in experts)
    if not numbers or len(experts) != content["num_hidden_layers"] or max(experts, default=1) < 2:
        raise CheckpointError(
            f"{where}: experts_per_layer is {experts!r}; expected a number for each layer, one above 1"
        )
    interval = next(layer for layer, count in enumerate(experts) if count > 1) + 1
    in_turn = tuple(experts[interval - 1 :: interval])
    moe = MoEConfig(
        num_experts=in_turn[:1] if len(set(in_turn)) == 1 else in_turn,
        expert_interval=interval,
        topk=content.get("num_experts_per_tok", 1),
        mlp_type="residual" if content.get("residual_moe") else "standard",
        moe_loss_coeff=content.get("router_aux_loss_coef", 0.01),
        moe_z_loss_coeff=content.get("router_z_loss_coef", 0.0),
    )
    found = [moe.experts_of_layer(layer) for layer in range(len(experts))]
    if found != experts:
        raise CheckpointError(
            f"{where}: experts_per_layer {experts} are not at every {interval}th layer, which is needed here"
        )
    return moe
