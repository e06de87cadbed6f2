"""The norm of the residual stream.

Shapes: H hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_collectives import sum_gradients


class LayerNorm(nn.LayerNorm):
    """torch's layer norm on the residual stream: with sequence parallelism on this process's tokens only."""

    def __init__(self, hidden_size: int, epsilon: float, group: TensorGroup = ALONE) -> None:
        super().__init__(hidden_size, eps=epsilon)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension, [..., H]."""
        weight, bias = self.weight, self.bias
        if self.group.sequence_parallel:
            weight, bias = sum_gradients(self.group, weight, bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def build_norm(model: ModelConfig, tensor_group: TensorGroup = ALONE) -> nn.Module:
    """A norm of ``model``: before attention, before the feed-forward, or before the head."""
    return LayerNorm(model.hidden_size, model.layernorm_epsilon, tensor_group)
