"""Megatron's arguments, which its checkpoints hold as an ``argparse.Namespace``, and our configuration."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.config import MoEConfig, RunConfig
from megatron.config.run import from_dict

# what a model here is, as arguments of Megatron: another value is another model
_FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("layernorm", "LayerNorm"),
    "swiglu": (False,),
    "squared_relu": (False,),
    "onnx_safe": (None, False),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "add_position_embedding": (True,),
    "use_rotary_position_embeddings": (False,),
    "position_embedding_type": ("learned_absolute",),
    "untie_embeddings_and_output_weights": (False,),
    "num_experts_switch": (None,),
    "group_query_attention": (False,),
    "multi_latent_attention": (False,),
    "moe_shared_expert_intermediate_size": (None,),
}
# the same of Megatron-LM alone; an argument that an older version does not have is not there
_FIXED_LM: dict[str, tuple[Any, ...]] = {
    "quick_geglu": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "experimental_attention_variant": (None,),
    "use_mup": (False,),
    "is_hybrid_model": (None, False),
    "hybrid_override_pattern": (None,),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "retro_add_retriever": (None, False),
    "mtp_num_layers": (None, 0),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
}
_NAMES_LM = {"norm_epsilon": "layernorm_epsilon", "moe_router_topk": "topk", "moe_aux_loss_coeff": "moe_loss_coeff"}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings")
_MODEL = (
    *_NEEDED, "ffn_hidden_size", "make_vocab_size_divisible_by", "init_method_std", "hidden_dropout",
    "attention_dropout", "layernorm_epsilon",
)  # fmt: skip
_MODEL_LM = ("qk_layernorm",)  # of Megatron-LM alone
_MOE = (
    "topk", "moe_loss_coeff", "moe_train_capacity_factor", "moe_min_capacity", "moe_token_dropping",
)  # fmt: skip
_ONLY_HERE = (  # of training, and no argument of Megatron-DeepSpeed's
    "moe_router_load_balancing_type", "moe_router_lr_mult", "moe_router_init_mult", "moe_z_loss_coeff",
    "moe_noise_policy", "moe_rts",
)  # fmt: skip


def to_arguments(
    config: RunConfig, vocab_size: int, tensor: int, experts_cut: bool, dtype: torch.dtype, clock: Mapping[str, int]
) -> argparse.Namespace:
    """The arguments of a run of Megatron-DeepSpeed with this model.

    Args:
        config: the model's.
        vocab_size: rows of the token table.
        tensor: tensor-parallel ranks.
        experts_cut: whether these share the experts' matrices too.
        dtype: of the weights.
        clock: ``samples`` that were seen and ``steps``.
    """
    model, moe = config.model, config.moe
    fixed = {name: allowed[0] for name, allowed in _FIXED.items()}
    shape = {name: getattr(model, name) for name in _MODEL} | {
        "ffn_hidden_size": model.ffn_size,
        "max_position_embeddings": model.position_rows,
        "encoder_seq_length": model.seq_length,
        "kv_channels": model.hidden_size // model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "padded_vocab_size": vocab_size,
    }
    experts = {name: getattr(moe, name) for name in (*_MOE, "mlp_type", "expert_interval")} | {
        "num_experts": list(moe.num_experts),
        "moe_loss_coeff": moe.aux_loss_coeff,
        # none is dropped: there are as many slots as tokens
        "moe_eval_capacity_factor": moe.moe_eval_capacity_factor or max(moe.num_experts) / moe.topk,
        "moe_top2_2nd_expert_sampling": False,
        "enable_expert_tensor_parallelism": experts_cut,
    }
    run = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": 1,
        "no_pipeline_parallel": True,
        "data_parallel_random_init": False,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "tokenizer_type": config.data.tokenizer_type,
        "vocab_file": config.data.vocab_file,
        "merge_file": config.data.merge_file,
        "openai_gelu": False,
        "bias_gelu_fusion": True,
        "add_bias_linear": True,
        "iteration": clock["steps"],
        "consumed_train_samples": clock["samples"],
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**fixed, **shape, **experts, **run)


def unsupported_options(moe: MoEConfig) -> list[str]:
    """Options of training that Megatron-DeepSpeed has no argument for, where they are not at their default."""
    changed = [name for name in _ONLY_HERE if getattr(moe, name) != getattr(MoEConfig(), name)]
    return [f"{name} {getattr(moe, name)}" for name in changed]


def from_arguments(
    args: Any, expert_counts: Mapping[int, int], residual: bool, where: Path, *, core: bool, tanh_gelu: bool
) -> RunConfig:
    """The configuration of a model.

    Args:
        args: Megatron's.
        expert_counts: experts that were found, by layer that has some.
        residual: whether these layers have a dense feed-forward too.
        where: for messages.
        core: whether it is a model of megatron.core's, to which a few arguments mean something else.
        tanh_gelu: whether a model of the exact GELU is taken for one of the tanh form.

    Raises:
        CheckpointError: the arguments are not there, or describe a model that is none of ours; what differs is named.
        ConfigError: a value is not of its type.
    """
    if args is None:
        raise CheckpointError(f"{where} was saved without Megatron's arguments (args), so the heads are not known")
    given = _by_one_name(vars(args))
    if missing := [name for name in _NEEDED if given.get(name) is None]:
        raise CheckpointError(f"{where}: its arguments have no {missing[0]}; it is no checkpoint of a GPT")
    other = [
        f"{name} {given[name]!r}"
        for name, allowed in (_FIXED | _FIXED_LM).items()
        if name in given and given[name] not in allowed
    ]
    heads, size = given["num_attention_heads"], given["hidden_size"]
    for name, expected in (
        ("num_key_value_heads", heads), ("kv_channels", size // heads if heads else None)
    ):  # fmt: skip
        if given.get(name) not in (None, expected):
            other.append(f"{name} {given[name]} beside {heads} heads and hidden_size {size}")
    fused = given.get("bias_gelu_fusion") is not False and given.get("add_bias_linear") is not False
    tanh = fused or (given.get("openai_gelu") and not core)
    if not (tanh or tanh_gelu or given.get("swiglu")):
        other.append(
            "the exact GELU (--no-bias-gelu-fusion or no biases), where a model here has the tanh form; "
            "--gelu-as-tanh takes the one for the other"
        )
    if core and expert_counts:
        other += _other_routing(given)
    shape = {name: given[name] for name in (*_MODEL, *_MODEL_LM) if name in given}
    if expert_counts and given.get("moe_ffn_hidden_size") not in (None, given.get("ffn_hidden_size") or 4 * size):
        if len(expert_counts) < given["num_layers"]:
            other.append(f"moe_ffn_hidden_size {given['moe_ffn_hidden_size']}, unlike that of dense layers")
        shape["ffn_hidden_size"] = given["moe_ffn_hidden_size"]
    if other:
        raise CheckpointError(f"{where} holds a model that is not known here: {some(other)}. Nothing was written")
    return from_dict({"model": shape, "moe": _experts(given, expert_counts, residual)})


def _by_one_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by Megatron-DeepSpeed's names, where Megatron-LM has others."""
    named = dict(given)
    for theirs, name in _NAMES_LM.items():
        if isinstance(given.get(theirs), int | float):  # one coefficient; several are of losses that are not known here
            named.setdefault(name, given[theirs])
    if given.get("seq_length") is None:  # the trainer's, not the model's
        named["seq_length"] = given.get("max_position_embeddings")
    if "moe_expert_capacity_factor" in given:
        factor = given["moe_expert_capacity_factor"]
        named["moe_token_dropping"] = factor is not None
        if factor is not None:
            named["moe_train_capacity_factor"] = factor
    return named


def _other_routing(given: Mapping[str, Any]) -> list[str]:
    """How the gates of megatron.core's router differ from ours: a probability among all experts for top-1, among the
    chosen ones for more."""
    topk, before = given.get("topk", 2), bool(given.get("moe_router_pre_softmax"))
    balancing = given.get("moe_router_load_balancing_type")
    other = ["moe_router_load_balancing_type 'sinkhorn'"] if "sinkhorn" in (balancing or ()) else []
    if before != (topk == 1):
        other.append(f"moe_router_pre_softmax {before} with moe_router_topk {topk}")
    return other


def _experts(given: Mapping[str, Any], counts: Mapping[int, int], residual: bool) -> dict[str, Any]:
    if not counts:
        return {}
    interval = min(counts) + 1
    if sorted(counts) != list(range(interval - 1, given["num_layers"], interval)):
        interval = 1  # in no regular places: a layer without experts is one with one
    experts = [counts.get(layer, 1) for layer in range(interval - 1, given["num_layers"], interval)]
    options = {name: given[name] for name in _MOE if name in given}
    if given.get("moe_z_loss_coeff") is not None:
        options["moe_z_loss_coeff"] = given["moe_z_loss_coeff"]
    return {
        **options,
        "num_experts": experts if len(set(experts)) > 1 else experts[:1],
        "expert_interval": interval,
        "mlp_type": "residual" if residual else "standard",
    }
