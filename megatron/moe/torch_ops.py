"""The operations of an MoE layer in plain torch; see :class:`megatron.moe.operations.Operations`.

Shapes: T tokens on this rank, H hidden, E experts, K experts of each token, L experts on this rank, F FFN hidden, C
rows of each expert, R rows of all, N = T * K assignments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from megatron.moe.losses import load_balancing_loss, z_loss
from megatron.moe.plan import Routing, RoutingPlan, count_experts
from megatron.parallel.tensor_collectives import SEQUENCE, broadcast_first, gather

if TYPE_CHECKING:
    from megatron.moe.experts import Weights
    from megatron.moe.router import Router


def route(router: Router, x: torch.Tensor) -> Routing:
    """The routing of tokens [..., H]."""
    logits_TE = router.logits(x)
    if router.tensor_group.sequence_parallel:
        logits_TE = gather(logits_TE, router.tensor_group, SEQUENCE)
    logits_TE = logits_TE.flatten(0, -2)
    gate_TE = logits_TE.softmax(-1)
    expert_TK = router.choose(logits_TE.detach())
    counts_E = count_experts(expert_TK, router.num_experts)
    capacity = router.capacity(logits_TE.size(0))
    slot_TK = router.assign_slots(expert_TK, gate_TE.detach().gather(1, expert_TK), counts_E, capacity)
    if router.own_logits:
        chosen_2TK = broadcast_first(torch.stack([expert_TK, slot_TK]).int(), router.tensor_group)
        expert_TK, slot_TK = chosen_2TK.long().unbind()
        counts_E = count_experts(expert_TK, router.num_experts)
    gate_TK = gate_TE.gather(1, expert_TK)
    if capacity is not None:
        gate_TK = gate_TK.masked_fill(slot_TK >= capacity, 0.0)
    if router.topk > 1:
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(gate_TK.dtype).eps)
    share_E = None if router.balancer is None else router.balancer.share_E
    return Routing(
        plan=RoutingPlan(expert_TK, gate_TK, slot_TK, counts_E, capacity),
        aux_loss=load_balancing_loss(gate_TE, expert_TK[:, :1] if router.topk == 2 else expert_TK, share_E),
        z_loss=z_loss(logits_TE),
    )


class IndexPermutation:
    """Permute and unpermute by index operations."""

    def __init__(self, plan: RoutingPlan, chunk: int | None) -> None:
        self._plan = plan
        self._row_N = (plan.sorted_row_TK() if plan.capacity is None else plan.buffer_row_TK(chunk)).flatten()

    def permute(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each assignment's token in its row, [R, H]; 0 in rows of none."""
        x_NH = x_TH[:, None].expand(-1, self._plan.expert_TK.size(1), -1).reshape(-1, x_TH.size(1))
        if self._plan.capacity is None:
            return torch.empty_like(x_NH).index_copy(0, self._row_N, x_NH)
        rows = x_TH.new_zeros(self._plan.counts_E.numel() * self._plan.capacity + 1, x_TH.size(1))
        return rows.index_copy(0, self._row_N, x_NH)[:-1]  # the last one is where dropped assignments go

    def unpermute(self, y_RH: torch.Tensor) -> torch.Tensor:
        """The sum over a token's assignments of gate * output, in the gates' format, then in that of the outputs."""
        if self._plan.capacity is not None:
            y_RH = torch.cat([y_RH, y_RH.new_zeros(1, y_RH.size(-1))])
        y_TKH = y_RH.index_select(0, self._row_N).view(*self._plan.gate_TK.shape, y_RH.size(-1))
        return (y_TKH * self._plan.gate_TK[..., None]).sum(1).to(y_RH.dtype)


def permutation(plan: RoutingPlan, chunk: int | None = None) -> IndexPermutation:
    """The permutation of a routing plan."""
    return IndexPermutation(plan, chunk)


def reorder(x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Row ``index_R[r]`` for each r."""
    return x_RH.index_select(0, index_R)


def expert_mlp(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Expert outputs [L, ..., H] for equally many rows for each expert."""
    w1_LHF, b1_LF, w2_LFH, b2_LH = weights
    h_LCF = F.gelu(torch.baddbmm(b1_LF[:, None], x.flatten(1, -2), w1_LHF), approximate="tanh")
    return torch.baddbmm(b2_LH[:, None], h_LCF, w2_LFH).view(x.shape)


def expert_mlp_sorted(x_RH: torch.Tensor, weights: Weights, counts_L: torch.Tensor) -> torch.Tensor:
    """Expert outputs [R, H] for rows sorted by expert; the host waits for ``counts_L``."""
    weights_of = list(zip(*weights, strict=True))
    rows_per_expert = counts_L.tolist()
    # Without any row, one empty product keeps the parameters in the graph: their gradients are then 0, not None.
    busy = [i for i, rows in enumerate(rows_per_expert) if rows] or [0]
    outputs = []
    for i, x_CH in zip(busy, x_RH.split([rows_per_expert[i] for i in busy]), strict=True):
        w1_HF, b1_F, w2_FH, b2_H = weights_of[i]
        h_CF = F.gelu(torch.addmm(b1_F, x_CH, w1_HF), approximate="tanh")
        outputs.append(torch.addmm(b2_H, h_CF, w2_FH))
    return torch.cat(outputs)
