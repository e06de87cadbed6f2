"""Attention of :mod:`modeling_gpt_moe` through transformers' attention interface, and what it may be given.

Shapes: B batch, S new tokens, M cached and new tokens, N heads, D head size, H hidden, T = B * S tokens, E experts.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_gpt_moe import GPTMoEConfig

MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters  # their names differ between releases
NOT_HERE = ("token_type_ids", "head_mask", "encoder_hidden_states", "encoder_attention_mask")


class SideOutputs:
    """What a layer returns beside its output. No list, dict or dataclass: accelerate and FSDP would pass on a copy."""

    router_logits: torch.Tensor | None = None  # [T, E], fp32
    attentions: torch.Tensor | None = None  # [B, N, S, M]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers [B, S, N, D] and probabilities [B, N, S, M]; the mask, [B or 1, 1, S, M], is added, or bool."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    probabilities = F.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class GPTMoEAttention(nn.Module):
    """Causal self-attention through transformers' attention interface."""

    is_causal = True  # for the interface

    def __init__(self, config: GPTMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attn_pdrop
        self.layer_idx = layer_idx
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_layernorm, self.k_layernorm = nn.Identity(), nn.Identity()
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_epsilon)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_epsilon)

    def forward(
        self,
        x_BSH: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        side_outputs: SideOutputs | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        B, S, _ = x_BSH.shape
        qkv = self.c_attn(x_BSH).view(B, S, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, S, D)
        q, k = self.q_layernorm(q), self.k_layernorm(k)
        if past_key_values is not None:
            # caches of fixed size of version 4 look for cache_position, a paged cache adds to what attention gets
            k, v = past_key_values.update(k, v, self.layer_idx, kwargs)
        kind = self.config._attn_implementation
        attend = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        y_BSND, probabilities = attend(
            self, q, k, v, attention_mask,
            dropout=self.dropout if self.training else 0.0, scaling=self.head_dim**-0.5, **kwargs,
        )  # fmt: skip
        if side_outputs is not None:
            side_outputs.attentions = probabilities
        return self.c_proj(y_BSND.reshape(B, S, -1))


def causal_mask(
    config: GPTMoEConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    slots_S: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> Any:
    """What the attention implementation takes as a mask: causal, without padding, and without a cache each packed
    sequence on its own, which begins where ``position_ids`` do not go on."""
    plain = attention_mask is None and position_ids is None and past_key_values is None
    if torch.jit.is_tracing() and plain and "cache_position" not in MASK_ARGUMENTS:  # older masks cannot be traced
        attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)  # or a constant is traced
    arguments = {"config": config, "attention_mask": attention_mask, "position_ids": position_ids}
    for name, value in (
        ("inputs_embeds", inputs_embeds),
        ("input_embeds", inputs_embeds),
        ("cache", past_key_values),
        ("past_key_values", past_key_values),
    ):
        if name in MASK_ARGUMENTS:
            arguments[name] = value
    if "cache_position" in MASK_ARGUMENTS and MASK_ARGUMENTS["cache_position"].default is inspect.Parameter.empty:
        arguments["cache_position"] = slots_S
    return create_causal_mask(**arguments)


def the_cache(past_key_values: Any, cache: Any) -> Any:
    """The one of both names that was given."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an argument that changes the output of other models has no meaning here.
    """
    for name, value in kwargs.items():
        cache = ("cache" in name or "past" in name or name in ("state", "mems")) and name != "cache_position"
        if value is not None and (cache or name in NOT_HERE):
            raise ValueError(
                f"{name} is no argument of this model" + (": its cache is past_key_values or cache" if cache else "")
            )


def check_packing(
    flash: bool, attention_mask: Any, position_ids: torch.Tensor | None, kwargs: Mapping[str, Any]
) -> None:
    """
    Raises:
        ValueError: packed sequences are given in a way in which they would see each other.
    """
    if position_ids is None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q needs position_ids, which begin at 0 in each packed sequence")
        return
    masked = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
    rows = flash and len(position_ids) > 1
    if not (masked or rows) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    restarts = position_ids.diff(dim=-1) != 1
    if masked:
        keep = attention_mask.bool().to(restarts.device)
        restarts = restarts & keep[:, 1:] & keep[:, :-1]
    if restarts.any():
        raise ValueError(
            "position_ids begin anew within a row, as those of packed sequences do: give these without attention_mask, "
            "and with flash attention in one row"
        )
