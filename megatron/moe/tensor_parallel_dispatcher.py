"""Which part of a micro-batch's routing plan each tensor-parallel process carries out.

All of them make the same plan, over all tokens. Where experts are replicated, each carries out a share of it: in
capacity mode a range of every expert's slots, so that each has the same static work; in dropless mode a range of the
tokens. Where experts are sharded, each carries out the whole plan with its shard of every expert.

Shapes: T tokens of the micro-batch, K experts of each token, S sequence, H hidden.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron.moe.dispatcher import Dispatcher
from megatron.moe.experts import Experts
from megatron.moe.plan import RoutingPlan, count_experts, slots
from megatron.parallel.groups import TensorGroup
from megatron.parallel.tensor_collectives import copy, enter_tensor_region, leave_tensor_region


class TensorParallelDispatcher:
    """A dispatcher for processes that share every layer's matrices.

    Tokens are in the form of the residual stream, [..., S, H]: all of them, or with sequence parallelism this process's
    piece of every sequence. The plan is for all tokens, equal on all processes.

    Args:
        inner: carries out this process's part of a plan.
        group: the tensor-parallel processes.
        dropless: whether plans have no capacity.
    """

    def __init__(self, inner: Dispatcher, group: TensorGroup, *, dropless: bool) -> None:
        self._inner, self._group = inner, group
        if group.shard_experts:
            self._run = self._whole_plan
        elif not dropless:
            self._run = self._range_of_slots
        elif group.sequence_parallel:
            self._run = self._own_tokens
        else:
            self._run = self._range_of_tokens

    def __call__(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None = None
    ) -> torch.Tensor:
        """See :class:`megatron.moe.dispatcher.Dispatcher`."""
        # A gate's gradient arises where its assignment is carried out; every process's router gets the sum.
        plan = dataclasses.replace(plan, gate_TK=copy(plan.gate_TK, self._group))
        return self._run(x, plan, experts, overlap)

    def _whole_plan(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None
    ) -> torch.Tensor:
        x = enter_tensor_region(x, self._group)
        return leave_tensor_region(self._inner(x, plan, experts, overlap), self._group)

    def _range_of_slots(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None
    ) -> torch.Tensor:
        return self._whole_plan(x, share_of_slots(plan, self._group), experts, overlap)

    def _own_tokens(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None
    ) -> torch.Tensor:
        group, S = self._group, x.size(-2)
        token_BS = torch.arange(plan.expert_TK.size(0), device=x.device).view(-1, S * group.size)
        own_T = token_BS.narrow(1, group.rank * S, S).flatten()
        return self._inner(x, share_of_tokens(plan, own_T), experts, overlap)

    def _range_of_tokens(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None
    ) -> torch.Tensor:
        """For any number of tokens, all of which this process holds."""
        group, x_TH = self._group, copy(x, self._group).flatten(0, -2)
        T = x_TH.size(0)
        length = -(-T // group.size)
        first, end = min(group.rank * length, T), min((group.rank + 1) * length, T)
        own_T = torch.arange(first, end, device=x.device)
        y_TH = self._inner(x_TH[first:end], share_of_tokens(plan, own_T), experts, overlap)
        return leave_tensor_region(F.pad(y_TH, (0, 0, first, T - end)).view(x.shape), group)


def share_of_slots(plan: RoutingPlan, group: TensorGroup) -> RoutingPlan:
    """The assignments in piece ``group.rank`` of each expert's slots; all others are dropped from it."""
    whole = plan.rows_per_expert()
    capacity = -(-whole // group.size)
    first = group.rank * capacity
    slot_TK = plan.slot_TK - first
    mine_TK = (slot_TK >= 0) & (slot_TK < capacity) & (plan.slot_TK < whole)
    return RoutingPlan(
        expert_TK=plan.expert_TK,
        gate_TK=plan.gate_TK.masked_fill(~mine_TK, 0.0),
        slot_TK=slot_TK.where(mine_TK, capacity),
        counts_E=(plan.counts_E.clamp(max=whole) - first).clamp(0, capacity),
        capacity=capacity,
    )


def share_of_tokens(plan: RoutingPlan, own_T: torch.Tensor) -> RoutingPlan:
    """The plan of some tokens (int64 numbers) of a dropless one."""
    expert_TK = plan.expert_TK[own_T]
    counts_E = count_experts(expert_TK, plan.counts_E.numel())
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(expert_TK.T.shape).T
    return RoutingPlan(expert_TK, plan.gate_TK[own_T], slot_TK, counts_E, None)
