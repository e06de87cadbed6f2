"""The operations of an MoE layer in Triton kernels; see :class:`megatron.moe.operations.Operations`.

They compute what those of :mod:`megatron.moe.torch_ops` do, the random selection of tokens included. Each takes at
least one row. This module is imported only where Triton is installed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from megatron.moe.kernels import experts as expert_kernels
from megatron.moe.kernels import permute as permute_kernels
from megatron.moe.kernels.gate import Balance, Gating, gate
from megatron.moe.kernels.top1_layer import top1_layer as top1_layer_kernels
from megatron.moe.plan import Routing, RoutingPlan
from megatron.parallel.tensor_collectives import broadcast_first

if TYPE_CHECKING:
    from megatron.moe.experts import Experts, Weights
    from megatron.moe.router import Router


def route(router: Router, x: torch.Tensor) -> Routing:
    """The routing of tokens [..., H] by a top-1 router."""
    capacity = router.capacity(x.numel() // x.size(-1))
    agree = functools.partial(broadcast_first, group=router.tensor_group) if router.own_logits else None
    random = router.training and router.random_selection
    x_TH = x.flatten(0, -2).contiguous()
    _, gating = gate(x_TH, router.weight, capacity, random=random, agree=agree, balance=_balance(router))
    return _routing(router, gating, capacity)


class KernelPermutation:
    """Permute and unpermute in one launch each."""

    def __init__(self, plan: RoutingPlan, chunk: int | None) -> None:
        self._gate_TK = plan.gate_TK
        expert_TK, slot_TK, counts_E = plan.expert_TK, plan.slot_TK, plan.counts_E
        if plan.capacity is None:
            self._row_map = permute_kernels.sorted_row_map(expert_TK, slot_TK, counts_E)
        else:
            self._row_map = permute_kernels.buffer_row_map(expert_TK, slot_TK, counts_E.numel(), plan.capacity, chunk)

    def permute(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each assignment's token in its row, [R, H]; 0 in rows of none."""
        return permute_kernels.permute(x_TH, self._row_map)

    def unpermute(self, y_RH: torch.Tensor) -> torch.Tensor:
        """The sum over a token's assignments of gate * expert output, [T, H]."""
        return permute_kernels.unpermute(y_RH, self._gate_TK, self._row_map)


def permutation(plan: RoutingPlan, chunk: int | None = None) -> KernelPermutation:
    """The permutation of a routing plan."""
    return KernelPermutation(plan, chunk)


def reorder(x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Row ``index_R[r]`` for each r, in one launch."""
    return permute_kernels.permute(x_RH, permute_kernels.RowMap(inverse_R, index_R))


def expert_mlp(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Expert outputs [L, G, c, H] for equally many rows for each expert; in memory [G, L, c, H], ready to be sent."""
    return expert_kernels.expert_mlp(x, weights)


def expert_mlp_sorted(x_RH: torch.Tensor, weights: Weights, counts_L: torch.Tensor) -> torch.Tensor:
    """Expert outputs [R, H] for rows sorted by expert; the host waits for nothing."""
    return expert_kernels.expert_mlp_sorted(x_RH, weights, counts_L.to(x_RH.device, non_blocking=True))


def top1_layer(router: Router, experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
    """The output of a top-1 layer [..., H] whose experts are all on this process, and its routing."""
    capacity = router.capacity(x.numel() // x.size(-1))
    if capacity is None:
        raise ValueError("the kernels of a whole top-1 layer need a capacity; use the separate steps without one")
    weights = (experts.w1, experts.b1, experts.w2, experts.b2)
    random = router.training and router.random_selection
    x_TH = x.flatten(0, -2).contiguous()
    y_TH, gating = top1_layer_kernels(x_TH, router.weight, weights, capacity, random=random, balance=_balance(router))
    return y_TH.view(x.shape), _routing(router, gating, capacity)


def _balance(router: Router) -> Balance:
    """What the router has learned; in training with what it learns from, which the kernels add to."""
    bias_E = share_E = histogram_REB = mean_H = input_sum = None
    if (balancer := router.balancer) is not None:
        bias_E, share_E = balancer.bias_E, balancer.share_E
        histogram_REB = balancer.histogram_REB if router.training else None
    if (centering := router.centering) is not None:
        mean_H, input_sum = centering.input_mean, centering.statistics if router.training else None
    return Balance(bias_E, share_E, histogram_REB, mean_H, input_sum)


def _routing(router: Router, gating: Gating, capacity: int | None) -> Routing:
    balancer = router.balancer
    if balancer is not None and router.training and balancer.histogram_REB is None:
        balancer.statistics += gating.counts_E
    expert_TK, gate_TK, slot_TK = gating.expert_T.long()[:, None], gating.gate_T[:, None], gating.slot_T.long()[:, None]
    plan = RoutingPlan(expert_TK, gate_TK, slot_TK, gating.counts_E, capacity, gating.dropped)
    return Routing(plan, gating.aux_loss, gating.z_loss)
