"""The dense feed-forward of a transformer layer.

Shapes: H hidden, F FFN hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with GELU in its tanh form as in GPT-2; tensor-parallel processes share the F units."""

    def __init__(self, model: ModelConfig, tensor_group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(model.hidden_size, model.ffn_size, tensor_group)
        self.fc2 = RowParallelLinear(model.ffn_size, model.hidden_size, tensor_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
