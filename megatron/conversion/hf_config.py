"""The configuration of a model as Hugging Face's libraries keep it (config.json), from ours and back."""

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config import ModelConfig, MoEConfig

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of GELU's tanh form
# names of each size, of which transformers takes any; and its default in GPT2Config
SIZES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "layers": (("n_layer", "num_hidden_layers"), 12),
    "hidden": (("n_embd", "hidden_size"), 768),
    "heads": (("n_head", "num_attention_heads"), 12),
    "ffn": (("n_inner",), None),  # 4 times hidden
    "positions": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
    "vocabulary": (("vocab_size",), 50257),
}
REALS = {  # of GPT-2 and of models with experts; ours, theirs, default
    "init_method_std": ("initializer_range", 0.02),
    "hidden_dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "layernorm_epsilon": ("layer_norm_epsilon", 1e-5),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def is_gpt2(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether transformers' own GPT-2 is this model; any other one needs the classes in ``hf_moe``."""
    return not (moe.enabled or model.qk_layernorm)


def to_hf(model: ModelConfig, moe: MoEConfig, vocab_size: int, ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of config.json: stock GPT-2, or the configuration class in ``hf_moe`` for a model that is none; with
    the ``ids`` of special tokens."""
    shared = {
        "vocab_size": vocab_size,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        **ids,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if is_gpt2(model, moe):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": ACTIVATIONS[0],
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "n_positions": model.position_rows,
            "n_ctx": model.position_rows,  # the same; llama.cpp's converter reads this one
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
        "experts_per_layer": moe.experts_per_layer(model.num_layers),
        "num_experts": max(moe.experts_per_layer(model.num_layers)),
        "num_experts_per_tok": moe.topk,
        "residual_moe": moe.mlp_type == "residual",
        "qk_layernorm": model.qk_layernorm,
        "router_expert_bias": moe.enabled and moe.has_expert_bias,
        "router_center_input": moe.enabled and moe.moe_router_center_input,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "router_z_loss_coef": moe.moe_z_loss_coeff,
        **shared,
    }


def from_hf(content: dict[str, Any], where: str) -> tuple[ModelConfig, MoEConfig, int]:
    """Our configuration of a config.json, and the rows of its token table.

    What the file leaves out has the value that transformers' GPT2Config gives it.

    Raises:
        CheckpointError: it describes a model that this code does not have, or contradicts itself; it is named how.
    """
    kind = content.get("model_type")
    if kind is None and content.get("architectures") == ["GPT2LMHeadModel"]:
        kind = "gpt2"
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
    sizes = _sizes(content, where, with_experts=kind == "gpt_moe")
    reals = {ours: content.get(theirs, default) for ours, (theirs, default) in REALS.items()}
    if wrong := [
        f"{REALS[ours][0]} is {value!r}"
        for ours, value in reals.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]:
        raise CheckpointError(f"{where}: {', '.join(wrong)}; expected numbers. Restore the file")
    qk_layernorm = kind == "gpt_moe" and _switch(content, "qk_layernorm", where)
    model = ModelConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        ffn_hidden_size=sizes["ffn"],
        seq_length=sizes["positions"],
        make_vocab_size_divisible_by=1,
        qk_layernorm=qk_layernorm,
        **reals,
    )
    moe = MoEConfig()
    if kind == "gpt_moe":
        moe = _experts(content, sizes["layers"], where, dense=qk_layernorm)
    return model, moe, sizes["vocabulary"]


def _switch(content: dict[str, Any], key: str, where: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}; expected true or false. Restore the file")
    return value


def _sizes(content: dict[str, Any], where: str, *, with_experts: bool) -> dict[str, Any]:
    """Each of ``SIZES``, under whichever of its names it has."""
    found: dict[str, Any] = {}
    problems = []
    for size, (names, default) in SIZES.items():
        if with_experts:  # of our own configuration class, which transformers fills in otherwise
            names, default = ("intermediate_size",) if size == "ffn" else names, None
        given = {name: content[name] for name in names if name in content}
        values = list(given.values()) or [default]
        if any(value != values[0] for value in values):
            told = " and ".join(f"{name} {value!r}" for name, value in given.items())
            raise CheckpointError(f"{where} contradicts itself: {told} are names of one size; restore the file")
        found[size] = values[0]
        optional = size == "ffn" and not with_experts
        if type(values[0]) is not int and not (optional and values[0] is None):
            problems.append(f"{next(iter(given), names[-1])} is {values[0]!r}")
    topk = content.get("num_experts_per_tok", 1)
    if type(topk) is not int:
        problems.append(f"num_experts_per_tok is {topk!r}")
    if problems:
        raise CheckpointError(f"{where}: {', '.join(problems)}; expected whole numbers. Restore the file")
    return found


def _experts(content: dict[str, Any], layers: int, where: str, *, dense: bool) -> MoEConfig:
    """The experts; ``dense`` tells whether there may be none."""
    experts = content.get("experts_per_layer")
    if (
        not isinstance(experts, list)
        or not all(isinstance(count, int) for count in experts)
        or len(experts) != layers
        or (max(experts, default=1) < 2 and not (dense and set(experts) == {1}))
    ):
        raise CheckpointError(
            f"{where}: experts_per_layer is {experts!r}; expected a number for each layer, one above 1"
        )
    biased, centered = (_switch(content, name, where) for name in ("router_expert_bias", "router_center_input"))
    if set(experts) == {1}:
        for name, given in (("router_expert_bias", biased), ("router_center_input", centered)):
            if given:
                raise CheckpointError(f"{where}: {name} is true, but no layer has experts. Restore the file")
        return MoEConfig()
    interval = next(layer for layer, count in enumerate(experts) if count > 1) + 1
    in_turn = tuple(experts[interval - 1 :: interval])
    moe = MoEConfig(
        num_experts=in_turn[:1] if len(set(in_turn)) == 1 else in_turn,
        expert_interval=interval,
        topk=content.get("num_experts_per_tok", 1),
        mlp_type="residual" if content.get("residual_moe") else "standard",
        moe_router_load_balancing_type="quantile_balancing" if biased else "aux_loss",
        moe_router_center_input=centered,
        moe_loss_coeff=content.get("router_aux_loss_coef", 0.01),
        moe_z_loss_coeff=content.get("router_z_loss_coef", 0.0),
    )
    found = [moe.experts_of_layer(layer) for layer in range(len(experts))]
    if found != experts:
        raise CheckpointError(
            f"{where}: experts_per_layer {experts} are not at every {interval}th layer, which is needed here"
        )
    return moe
