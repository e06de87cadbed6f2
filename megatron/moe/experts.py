"""The experts of one rank, stacked.

Letters: E experts, L experts on this rank, H hidden, F FFN hidden, N tokens of each expert, R rows of all experts.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from megatron.parallel.groups import ExpertGroup


class Experts(nn.Module):
    """L feed-forwards of one shape: gelu(x w1 + b1) w2 + b2, with GELU in its tanh form.

    The parameters carry ``is_expert`` for the engine, which reduces their gradients over fewer processes than others.
    """

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, group: ExpertGroup) -> None:
        super().__init__()
        if num_experts % group.size:
            raise ValueError(f"{num_experts} experts do not divide evenly over {group.size} processes")
        self.num_experts, self.num_local = num_experts, num_experts // group.size
        self.first = group.rank * self.num_local
        L = self.num_local
        self.w1 = nn.Parameter(torch.empty(L, hidden_size, ffn_size))
        self.b1 = nn.Parameter(torch.empty(L, ffn_size))
        self.w2 = nn.Parameter(torch.empty(L, ffn_size, hidden_size))
        self.b2 = nn.Parameter(torch.empty(L, hidden_size))
        for parameter in self.parameters():
            parameter.is_expert = True

    @torch.no_grad()
    def initialize(self, std: float, output_std: float, seed: int, layer: int) -> None:
        """Draw each expert's weights by itself; they depend on the seed, the layer and the expert's number alone."""
        self.b1.zero_()
        self.b2.zero_()
        for local in range(self.num_local):
            generator = expert_generator(seed, layer, self.first + local)
            for weight, scale in ((self.w1, std), (self.w2, output_std)):
                values = torch.empty(weight.shape[1:], dtype=torch.float32)
                weight[local].copy_(values.normal_(0.0, scale, generator=generator))

    def forward(self, x_LNH: torch.Tensor) -> torch.Tensor:
        """Each expert on N rows of its own; [L, N, H]."""
        h_LNF = F.gelu(torch.baddbmm(self.b1[:, None], x_LNH, self.w1), approximate="tanh")
        return torch.baddbmm(self.b2[:, None], h_LNF, self.w2)

    def grouped(self, x_RH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Expert l on ``counts[l]`` rows, which follow those of the expert before; [R, H]."""
        outputs = []
        for local, x_NH in enumerate(x_RH.split(counts)):
            h_NF = F.gelu(torch.addmm(self.b1[local], x_NH, self.w1[local]), approximate="tanh")
            outputs.append(torch.addmm(self.b2[local], h_NF, self.w2[local]))
        return torch.cat(outputs)


def expert_generator(seed: int, layer: int, expert: int | str) -> torch.Generator:
    """The random generator of one part of an MoE layer: an expert's number, or a name."""
    digest = hashlib.sha256(f"{seed}/moe/{layer}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
