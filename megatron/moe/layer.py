"""The mixture-of-experts layer: router -> dispatch -> experts -> combine.

Shapes: T tokens on this rank, H hidden, E experts, L experts on this rank.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.moe import fused
from megatron.moe.dispatch import CapacityExchange, DroplessExchange
from megatron.moe.experts import Experts
from megatron.moe.initialization import fill_normal, named_generator
from megatron.moe.mlp import MLP
from megatron.moe.plan import RoutingPlan
from megatron.moe.router import Router
from megatron.moe.sharing import carry_out
from megatron.parallel import groups
from megatron.parallel.groups import ExpertGroup, TensorGroup
from megatron.parallel.sharding import collect_layouts
from megatron.parallel.tensor_collectives import sum_gradients

ALONE = ExpertGroup(size=1, rank=0, group=None)


class MoEStats(NamedTuple):
    """What an MoE layer tells of one micro-batch beside its output. The losses are not scaled by coefficients."""

    aux_loss: torch.Tensor  # scalar, fp32 (float64 for float64 input), load balancing
    z_loss: torch.Tensor  # scalar likewise, router z-loss
    counts_E: torch.Tensor  # int64, this micro-batch's tokens routed to each expert, before dropping
    dropped: torch.Tensor  # int64 scalar, this micro-batch's assignments that found no room


class MoELayer(nn.Module):
    """Feed-forward in which each token passes through ``moe.topk`` of ``num_experts`` experts.

    In training every expert has a buffer of fixed size and tokens beyond it are dropped, unless
    ``moe.moe_token_dropping`` is off. In evaluation nothing is dropped, unless ``moe.moe_eval_capacity_factor`` is set,
    and nothing is random. Any number of tokens will do, one or none included. What makes routing random in training
    (see :class:`megatron.moe.router.Router`) draws from torch's default generator of the device.

    The residual form (``moe.mlp_type`` "residual"; Rajbhandari et al. 2022, section 4.1) adds a dense feed-forward:
    y = experts(x) * c_0 + mlp(x) * c_1 with c = softmax(coefficient(x)).

    Args:
        model: gives the widths and the scale of initial values.
        moe: how tokens are routed.
        num_experts: E of this layer.
        expert_group: the processes that share the experts. In capacity mode all must pass in equally many tokens.
        tensor_group: the processes that share every layer's matrices. All pass in the same tokens, or with sequence
            parallelism a piece of each sequence.
        seed: initial values follow from this, ``layer`` and each expert's number.
        layer: number of this layer in the model, from 0.

    Raises:
        ValueError: the processes do not divide the experts, or ``moe.topk`` is not between 1 and E.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        num_experts: int,
        expert_group: ExpertGroup = ALONE,
        tensor_group: TensorGroup = groups.ALONE,
        *,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.expert_group = expert_group
        self.tensor_group = tensor_group
        self.router = Router(model.hidden_size, num_experts, moe, tensor_group)
        self.experts = Experts(model.hidden_size, model.ffn_size, num_experts, expert_group, tensor_group)
        self.mlp: MLP | None = None
        if moe.mlp_type == "residual":
            self.mlp = MLP(model, tensor_group)
            self.coefficient = nn.Linear(model.hidden_size, 2)
        if not self.router.weight.is_meta:
            self._initialize(model, seed, layer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        """Map [..., H] to [..., H], 0 for a token of which every assignment was dropped; and tell losses and counts.

        With several processes, all of the group must call this together.
        """
        dense: list[torch.Tensor] = []  # the dense feed-forward's output, computed while tokens travel

        def serve(x_TH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
            return self._serve(x_TH, plan, lambda: None if self.mlp is None else dense.append(self.mlp(x)))

        if fused.serves(self.router, self.experts, x):
            y, (plan, aux_loss, z_loss) = fused.serve(self.router, self.experts, x)
            if self.mlp is not None:
                dense.append(self.mlp(x))
        else:
            route = fused.route if fused.routes(self.router, x) else Router.__call__
            plan, aux_loss, z_loss = route(self.router, x)
            y = carry_out(serve, x, plan, self.tensor_group)
        if self.mlp is not None:
            weight, bias = self.coefficient.weight, self.coefficient.bias
            if self.tensor_group.sequence_parallel:
                weight, bias = sum_gradients(self.tensor_group, weight, bias)
            c = F.linear(x, weight, bias).softmax(-1)
            y = y * c[..., :1] + dense[0] * c[..., 1:]
        return y, MoEStats(aux_loss, z_loss, plan.counts_E, plan.dropped)

    def _serve(self, x_TH: torch.Tensor, plan: RoutingPlan, meanwhile: Callable[[], None]) -> torch.Tensor:
        """The experts' weighted answers, [T, H]; ``meanwhile`` is called while tokens travel to the experts."""
        exchange: CapacityExchange | DroplessExchange
        exchange = (DroplessExchange if plan.capacity is None else CapacityExchange)(
            plan, self.expert_group, in_kernels=fused.carries(x_TH)
        )
        there = exchange.dispatch(x_TH)
        meanwhile()
        back = [exchange.send_back(self._answer(exchange.arrive(trip), exchange)) for trip in there]
        return exchange.combine(back)

    def _answer(self, rows: torch.Tensor, exchange: CapacityExchange | DroplessExchange) -> torch.Tensor:
        """The experts' answers to rows that arrived."""
        if isinstance(exchange, CapacityExchange):
            return fused.answer(self.experts, rows) if fused.answers(self.experts, rows) else self.experts(rows)
        if fused.answers_sorted(self.experts, rows):
            return fused.answer_sorted(self.experts, rows, exchange.counts_L)
        return self.experts.forward_sorted(rows, exchange.rows_per_expert)

    @torch.no_grad()
    def _initialize(self, model: ModelConfig, seed: int, layer: int) -> None:
        """Weights are normal(0, std), into the residual stream normal(0, std / sqrt(2 layers)); biases are 0."""
        std = model.init_method_std
        output_std = std / math.sqrt(2 * model.num_layers)
        self.experts.initialize(std, output_std, seed, layer)
        fill_normal(self.router.weight, std, named_generator(seed, layer, "router"))
        if self.mlp is not None:
            for name, linear, scale in (
                ("mlp.fc1", self.mlp.fc1, std),
                ("mlp.fc2", self.mlp.fc2, output_std),
                ("coefficient", self.coefficient, std),
            ):
                shards = collect_layouts(linear)["weight"].shards
                fill_normal(linear.weight, scale, named_generator(seed, layer, name), shards)
                linear.bias.zero_()
