"""One transformer layer, dense or mixture of experts.

Shapes: B batch, S sequence, H hidden.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.model.attention import SelfAttention
from megatron.model.norm import build_norm
from megatron.moe.layer import MoELayer, MoEStats
from megatron.moe.mlp import MLP
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup
from megatron.parallel.tensor_parallel import Dropout


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-LayerNorm, as GPT-2), with dropout on both outputs.

    Args:
        model: its shape.
        moe: whether ``mlp`` is a mixture of experts, and how tokens are routed.
        layer: number of the layer in the model, from 0.
        expert_group: the processes that share the experts.
        seed: initial values of experts follow from it.
        tensor_group: the processes that share every matrix.
    """

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
        self.input_layernorm = build_norm(model, tensor_group)
        self.attention = SelfAttention(model, layer, tensor_group)
        self.post_attention_layernorm = build_norm(model, tensor_group)
        self.mlp: MLP | MoELayer
        if (num_experts := moe.experts_of_layer(layer)) > 1:
            self.mlp = MoELayer(model, moe, num_experts, expert_group, tensor_group, seed=seed, layer=layer)
        else:
            self.mlp = MLP(model, tensor_group)
        self.dropout = Dropout(model.hidden_dropout, tensor_group)

    def forward(self, x_BSH: torch.Tensor, **attention: Any) -> tuple[torch.Tensor, MoEStats | None]:
        """The next value of the residual stream [B, S, H], and an MoE layer's losses and counts.

        ``attention`` is what :meth:`SelfAttention.forward` takes besides its input.
        """
        if isinstance(self.mlp, MLP):
            return self.dense(x_BSH, **attention), None
        x_BSH, normed_BSH = self.attend(x_BSH, **attention)
        y_BSH, stats = self.mlp(normed_BSH)
        return self.add(x_BSH, y_BSH), stats

    def dense(self, x_BSH: torch.Tensor, **attention: Any) -> torch.Tensor:
        """A whole dense layer."""
        x_BSH, normed_BSH = self.attend(x_BSH, **attention)
        return self.add(x_BSH, self.mlp(normed_BSH))

    def attend(self, x_BSH: torch.Tensor, **attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half of a layer: the residual stream after attention, and what the feed-forward reads of it."""
        x_BSH = self.add(x_BSH, self.attention(self.input_layernorm(x_BSH), **attention))
        return x_BSH, self.post_attention_layernorm(x_BSH)

    def add(self, x_BSH: torch.Tensor, y_BSH: torch.Tensor) -> torch.Tensor:
        """``y_BSH`` with dropout on the residual stream."""
        return x_BSH + self.dropout(y_BSH)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let torch.compile fuse what lies between the matrix products: all of dense layers, and of MoE layers all but
    the experts, which have kernels of their own. Layers of one kind share the compiled code."""
    for layer in layers:
        parts = ("dense",) if isinstance(layer.mlp, MLP) else ("attend", "add")
        for part in parts:
            setattr(layer, part, torch.compile(getattr(layer, part), dynamic=False))
