"""One transformer layer, dense or mixture of experts.

Letters: B batch, S sequence, H hidden, E experts.
"""

from typing import NamedTuple

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.model.attention import KeyValueCache, SelfAttention
from megatron.moe.layer import MoELayer
from megatron.moe.mlp import MLP
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup
from megatron.parallel.tensor_parallel import Dropout, LayerNorm


class Routing(NamedTuple):
    """What an MoE layer tells beside its output."""

    aux_loss: torch.Tensor  # fp32 scalar, load balancing
    z_loss: torch.Tensor  # fp32 scalar, router z-loss
    counts_E: torch.Tensor  # int64, tokens routed to each expert, before dropping
    dropped: torch.Tensor  # int64 scalar, assignments that found no room


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (pre-LayerNorm, as GPT-2)."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        layer: int,
        expert_group: ExpertGroup,
        seed: int,
        tensor_group: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        H, num_experts = model.hidden_size, moe.experts_of_layer(layer)
        self.input_layernorm = LayerNorm(H, model.layernorm_epsilon, tensor_group)
        self.attention = SelfAttention(H, model.num_attention_heads, model.attention_dropout, layer, tensor_group)
        self.post_attention_layernorm = LayerNorm(H, model.layernorm_epsilon, tensor_group)
        self.mlp: MLP | MoELayer
        if num_experts > 1:
            self.mlp = MoELayer(model, moe, num_experts, expert_group, tensor_group, seed=seed, layer=layer)
        else:
            self.mlp = MLP(H, model.ffn_size, tensor_group)
        self.dropout = Dropout(model.hidden_dropout, tensor_group)

    def forward(self, x_BSH: torch.Tensor, cache: KeyValueCache | None = None) -> tuple[torch.Tensor, Routing | None]:
        """The next value of the residual stream [B, S, H], and an MoE layer's losses and counts."""
        x_BSH = x_BSH + self.dropout(self.attention(self.input_layernorm(x_BSH), cache))
        normed_BSH = self.post_attention_layernorm(x_BSH)
        if isinstance(self.mlp, MLP):
            return x_BSH + self.dropout(self.mlp(normed_BSH)), None
        out = self.mlp(normed_BSH)
        routing = Routing(out.aux_loss, out.z_loss, out.counts_E, out.dropped)
        return x_BSH + self.dropout(out.y), routing
