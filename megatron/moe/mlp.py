"""The dense feed-forward of a transformer layer.

Letters: H hidden, F FFN hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with GELU in its tanh form as in GPT-2."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, ffn_size)
        self.fc2 = nn.Linear(ffn_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
