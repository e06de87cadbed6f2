"""Which part of a micro-batch's routing plan each tensor-parallel process carries out.

All of them make the same plan, over all tokens. Where experts are replicated, each serves a share of it: in capacity
mode a range of every expert's slots, so that each has the same static work; in dropless mode a range of the tokens.
Where experts are sharded, each carries out the whole plan with its part of every expert.

Shapes: T tokens of the micro-batch, K experts of each token, H hidden.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron.moe.plan import RoutingPlan, count_experts, slots
from megatron.parallel.groups import TensorGroup
from megatron.parallel.tensor_collectives import copy, enter, leave


def carry_out(
    run: Callable[[torch.Tensor, RoutingPlan], torch.Tensor], x: torch.Tensor, plan: RoutingPlan, group: TensorGroup
) -> torch.Tensor:
    """The experts' answers to ``x``, both in the form of the residual stream, [..., S, H].

    Args:
        run: maps tokens [n, H] and the plan for them to answers [n, H].
        x: this process's tokens: all, or with sequence parallelism its piece of every sequence.
        plan: for all tokens, equal on all processes.
        group: the tensor-parallel processes.
    """
    if group.size == 1:
        return run(x.flatten(0, -2), plan).view(x.shape)
    # A gate's gradient arises where its assignment is served; every process's router gets the sum.
    plan = dataclasses.replace(plan, gate_TK=copy(plan.gate_TK, group))
    if plan.capacity is None and not group.shard_experts:
        if group.sequence_parallel:
            T = plan.expert_TK.size(0)
            token_BS = torch.arange(T, device=x.device).view(-1, x.size(-2) * group.size)
            own_T = token_BS.narrow(1, group.rank * x.size(-2), x.size(-2)).flatten()
            return run(x.flatten(0, -2), share_of_tokens(plan, own_T)).view(x.shape)
        return _range_of_tokens(run, x, plan, group)
    if not group.shard_experts:
        plan = share_of_slots(plan, group)
    x = enter(x, group)
    return leave(run(x.flatten(0, -2), plan).view(x.shape), group)


def _range_of_tokens(
    run: Callable[[torch.Tensor, RoutingPlan], torch.Tensor], x: torch.Tensor, plan: RoutingPlan, group: TensorGroup
) -> torch.Tensor:
    """``carry_out`` for any number of tokens, which all processes hold."""
    x_TH = copy(x, group).flatten(0, -2)
    T = x_TH.size(0)
    length = -(-T // group.size)
    first, end = min(group.rank * length, T), min((group.rank + 1) * length, T)
    own_T = torch.arange(first, end, device=x.device)
    y_TH = F.pad(run(x_TH[first:end], share_of_tokens(plan, own_T)), (0, 0, first, T - end))
    return leave(y_TH.view(x.shape), group)


def share_of_slots(plan: RoutingPlan, group: TensorGroup) -> RoutingPlan:
    """The assignments in piece ``group.rank`` of each expert's slots; all others are dropped from it."""
    capacity = -(-plan.capacity // group.size)
    first = group.rank * capacity
    slot_TK = plan.slot_TK - first
    mine_TK = (slot_TK >= 0) & (slot_TK < capacity) & (plan.slot_TK < plan.capacity)
    return RoutingPlan(
        expert_TK=plan.expert_TK,
        gate_TK=plan.gate_TK.masked_fill(~mine_TK, 0.0),
        slot_TK=slot_TK.where(mine_TK, capacity),
        counts_E=(plan.counts_E.clamp(max=plan.capacity) - first).clamp(0, capacity),
        capacity=capacity,
    )


def share_of_tokens(plan: RoutingPlan, own_T: torch.Tensor) -> RoutingPlan:
    """The plan of some tokens (int64 numbers) of a dropless one."""
    expert_TK = plan.expert_TK[own_T]
    counts_E = count_experts(expert_TK, plan.counts_E.numel())
    slot_TK = slots(expert_TK.T.flatten(), counts_E).view(expert_TK.T.shape).T
    return RoutingPlan(expert_TK, plan.gate_TK[own_T], slot_TK, counts_E, None)
