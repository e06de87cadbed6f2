"""Which Triton kernels know all options of a layer.

    top1_layer           router, permutation and experts of a top-1 layer with a capacity as one function
    route                the top-1 router
    permutation          tokens into the rows of their experts, and expert outputs back
    reorder              rows from several processes sorted by expert, and back
    expert_mlp           the experts, with equally many rows for each
    expert_mlp_sorted    the experts, with rows sorted by expert

A kernel opts in: it is not used for a layer with an option that it does not name here, unless that has its default. To
use kernels for a new option, name it where they know it.
"""

import functools
import logging
from collections.abc import Container, Mapping
from typing import Any

from megatron.moe.spec import ANY, LayerSpec, Where

_LOG = logging.getLogger(__name__)

Options = Mapping[str, Container[Any]]

MOST_EXPERTS = 1024

# Options that change nothing in what a kernel is asked to compute: sizes, initial values, other parts of the model, and
# what is decided before a kernel runs.
_ELSEWHERE: Options = dict.fromkeys(
    (
        "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.ffn_hidden_size",
        "model.seq_length", "model.max_position_embeddings", "model.make_vocab_size_divisible_by",
        "model.init_method_std", "model.hidden_dropout", "model.attention_dropout", "model.layernorm_epsilon",
        "model.qk_layernorm",
        "moe.num_experts", "moe.expert_interval", "moe.mlp_type", "moe.moe_loss_coeff", "moe.moe_z_loss_coeff",
        "moe.moe_train_capacity_factor", "moe.moe_eval_capacity_factor", "moe.moe_min_capacity", "training",
        "moe.moe_router_bias_update_rate", "moe.moe_router_quantile_balancing_ema",
        "moe.moe_router_lr_mult", "moe.moe_router_init_mult",
    ),
    ANY,
)  # fmt: skip

# A permutation is right for any routing plan, and experts compute any rows, however the router decided.
_ANY_ROUTING: Options = dict.fromkeys(
    (
        "moe.topk", "moe.moe_token_dropping", "moe.moe_noise_policy", "moe.moe_rts", "num_experts",
        "moe.moe_router_load_balancing_type", "moe.moe_router_enable_expert_bias", "moe.moe_router_center_input",
    ),
    ANY,
)  # fmt: skip
_ANY_LAYOUT: Options = dict.fromkeys(
    [f"expert_group.{name}" for name in ("size", "rank", "group", "node_groups", "overlap_chunks")]
    + [f"tensor_group.{name}" for name in ("size", "rank", "group", "sequence_parallel", "shard_experts")],
    ANY,
)


def _any_plan(spec: LayerSpec) -> Options:
    return {**_ELSEWHERE, **_ANY_ROUTING, **_ANY_LAYOUT}


def _expert_mlp_sorted(spec: LayerSpec) -> Options:
    local_experts = Where(lambda num_experts: num_experts // spec.expert_group.size <= MOST_EXPERTS)
    return {**_any_plan(spec), "num_experts": local_experts}


def _route(spec: LayerSpec) -> Options:
    return {
        **_ELSEWHERE,
        **_ANY_LAYOUT,
        "num_experts": range(MOST_EXPERTS + 1),
        "moe.topk": (1,),
        "moe.moe_token_dropping": ANY,
        "moe.moe_noise_policy": (None,) if spec.training else ANY,  # there is noise in training only
        "moe.moe_rts": ANY,
        "moe.moe_router_load_balancing_type": ("aux_loss", "global_aux_loss", "quantile_balancing", "none"),
        "moe.moe_router_enable_expert_bias": (False, True),
        "moe.moe_router_center_input": (False, True),
        "tensor_group.sequence_parallel": (False,),
    }


def _top1_layer(spec: LayerSpec) -> Options:
    has_capacity = Where(lambda factor: factor is not None)
    return {
        **_route(spec),
        "moe.moe_token_dropping": (True,) if spec.training else ANY,
        "moe.moe_eval_capacity_factor": ANY if spec.training else has_capacity,
        "expert_group.size": (1,),
        "tensor_group.size": (1,),
    }


_KNOWN = {
    "top1_layer": _top1_layer,
    "route": _route,
    "permutation": _any_plan,
    "reorder": _any_plan,
    "expert_mlp": _any_plan,
    "expert_mlp_sorted": _expert_mlp_sorted,
}


def supports(kernel: str, spec: LayerSpec) -> bool:
    """Whether ``kernel`` computes what a layer of this ``spec`` asks for."""
    return not spec.unknown(_KNOWN[kernel](spec))


def supported_kernels(spec: LayerSpec) -> frozenset[str]:
    """All kernels that do; if none does because of an option, the log says so once."""
    unknown = spec.unknown(_any_plan(spec))
    if unknown:
        _log_unknown(unknown)
    return frozenset(kernel for kernel in _KNOWN if supports(kernel, spec))


@functools.cache
def _log_unknown(options: tuple[str, ...]) -> None:
    _LOG.info("MoE layers run in plain torch: no Triton kernel knows the value of %s", ", ".join(options))
