"""The norms of the residual stream, and of queries and keys.

Shapes: H hidden, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_collectives import sum_gradients


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, with parameters that all processes of a group hold alike.

    With ``sharded`` each process normalizes its own part of the vectors, so that the parameters' gradients have to be
    added over the group.
    """

    def __init__(self, size: int, epsilon: float, group: TensorGroup = ALONE, *, sharded: bool = False) -> None:
        super().__init__(size, eps=epsilon)
        self.group = group
        self.sharded = sharded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension of ``x``."""
        weight, bias = self.weight, self.bias
        if self.sharded:
            weight, bias = sum_gradients(self.group, weight, bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def build_norm(model: ModelConfig, tensor_group: TensorGroup = ALONE) -> nn.Module:
    """A norm of ``model`` over [..., H]: before attention, before the feed-forward, or before the head.

    With sequence parallelism a process has some of the tokens.
    """
    sharded = tensor_group.sequence_parallel
    return LayerNorm(model.hidden_size, model.layernorm_epsilon, tensor_group, sharded=sharded)


def build_head_norm(model: ModelConfig, tensor_group: TensorGroup = ALONE) -> nn.Module:
    """A norm of ``model`` over the queries or keys [..., D] of each head, with parameters that all heads share.

    A tensor-parallel process has some of the heads.
    """
    head_size = model.hidden_size // model.num_attention_heads
    return LayerNorm(head_size, model.layernorm_epsilon, tensor_group, sharded=True)
