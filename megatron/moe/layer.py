"""A feed-forward layer that is a mixture of experts.

Letters: T tokens on this rank, H hidden, E experts.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.dispatch import run_experts
from megatron.moe.experts import Experts, expert_generator
from megatron.moe.mlp import MLP
from megatron.moe.router import Router
from megatron.parallel.groups import ExpertGroup


class MoEOutput(NamedTuple):
    """Output of the layer and what the trainer wants to know."""

    y: torch.Tensor  # as the input, without the residual connection
    aux_loss: torch.Tensor  # fp32 scalar, load balancing, unscaled
    z_loss: torch.Tensor  # fp32 scalar, unscaled
    counts_E: torch.Tensor  # int64, this rank's assignments of each expert, dropped ones included
    dropped: torch.Tensor  # int64 scalar, this rank's assignments that found no slot


class MoELayer(nn.Module):
    """Router and experts; with ``mlp_type`` "residual" a dense feed-forward beside them, mixed in by a learned weight.

    Capacity and random choices count the tokens of one forward pass on this rank, that is of one micro-batch.
    Residual MoE: y = c_0 * experts(x) + c_1 * mlp(x), c = softmax(W x + b) (arXiv 2201.05596, section 4.1).

    Args:
        model: sizes and initial standard deviation.
        moe: routing.
        num_experts: E of this layer, over all processes.
        expert_group: the processes that share them.
        seed: initial values depend on this, on ``layer`` and on the expert's number, not on the processes.
        layer: number of the layer in the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        num_experts: int,
        expert_group: ExpertGroup = ExpertGroup(),  # noqa: B008 (immutable)
        *,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.expert_group = expert_group
        self.router = Router(model.hidden_size, num_experts, moe)
        self.experts = Experts(model.hidden_size, model.ffn_size, num_experts, expert_group)
        residual = moe.mlp_type == "residual"
        self.mlp = MLP(model.hidden_size, model.ffn_size) if residual else None
        self.coefficient = nn.Linear(model.hidden_size, 2) if residual else None
        if not self.router.weight.is_meta:
            self._initialize(model, seed, layer)

    @torch.no_grad()
    def _initialize(self, model: ModelConfig, seed: int, layer: int) -> None:
        std, output_std = model.init_method_std, model.init_method_std / math.sqrt(2 * model.num_layers)
        self.experts.initialize(std, output_std, seed, layer)
        for name, parameter in self.named_parameters():
            if name.startswith("experts."):
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            scale = output_std if name == "mlp.fc2.weight" else std
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(values.normal_(0.0, scale, generator=expert_generator(seed, layer, name)))

    def forward(self, x: torch.Tensor) -> MoEOutput:
        """Apply the layer to ``x`` [..., H]."""
        x_TH = x.reshape(-1, x.size(-1))
        plan, aux_loss, z_loss = self.router(x_TH)
        y_TH = run_experts(x_TH, plan, self.experts, self.expert_group)
        if self.mlp is not None and self.coefficient is not None:
            c_T2 = self.coefficient(x_TH).softmax(dim=-1)
            y_TH = y_TH * c_T2[:, :1] + self.mlp(x_TH) * c_T2[:, 1:]
        return MoEOutput(y_TH.view_as(x), aux_loss, z_loss, plan.counts_E, plan.dropped)
