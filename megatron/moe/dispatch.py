"""Tokens to experts and back.

Letters: T tokens on this rank, K experts a token, H hidden, E experts, L experts on this rank, C capacity, R rows of
all experts' buffers.

With a capacity every shape is known beforehand: R = E * C, the all-to-all has equal splits, and nothing asks the
device. Without one the buffers are as long as they need to be, and the processes tell each other how long.
"""

import torch
import torch.distributed as dist

from megatron.moe.experts import Experts
from megatron.moe.plan import RoutingPlan
from megatron.parallel.collectives import all_to_all
from megatron.parallel.groups import ExpertGroup


class _TakeRows(torch.autograd.Function):
    """out[r] = x[source[r]], zeros where source is -1.

    ``uses_NM`` tells the same backwards: the rows of ``out`` in which row n of x is used, padded with -1. With it the
    gradient is a sum of rows too, in a fixed order, instead of additions that race each other.
    """

    @staticmethod
    def forward(ctx, x_NH: torch.Tensor, source_R: torch.Tensor, uses_NM: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(uses_NM)
        return _rows_or_zero(x_NH, source_R)

    @staticmethod
    def backward(ctx, grad_RH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (uses_NM,) = ctx.saved_tensors
        grad_NH = _rows_or_zero(grad_RH, uses_NM[:, 0])
        for column in uses_NM.unbind(1)[1:]:
            grad_NH = grad_NH + _rows_or_zero(grad_RH, column)
        return grad_NH, None, None


def _rows_or_zero(x_NH: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x_NH[index.clamp(min=0)].masked_fill_((index < 0)[:, None], 0)


def run_experts(x_TH: torch.Tensor, plan: RoutingPlan, experts: Experts, group: ExpertGroup) -> torch.Tensor:
    """Send each token to its experts, and sum their outputs weighted by the gates; [T, H].

    Dropped assignments add nothing.
    """
    T, K = plan.expert_TK.shape
    row_TK = plan.row_TK
    rows = T * K if plan.capacity is None else len(plan.counts_E) * plan.capacity
    # the assignment in each row; one row more takes the dropped ones
    assignment_R = torch.full((rows + 1,), -1, dtype=torch.int64, device=x_TH.device)
    number_TK = torch.arange(T * K, device=x_TH.device)
    assignment_R = assignment_R.scatter(0, row_TK.flatten() % (rows + 1), number_TK)[:-1]

    sent_RH = _TakeRows.apply(x_TH, assignment_R.div(K, rounding_mode="floor"), row_TK)
    compute = _dropless if plan.capacity is None else _with_capacity
    received_RH = compute(sent_RH, plan, experts, group)
    output_TKH = _TakeRows.apply(received_RH, row_TK.flatten(), assignment_R[:, None]).view(T, K, -1)
    return (output_TKH * plan.gate_TK.to(x_TH.dtype)[..., None]).sum(dim=1)


def _with_capacity(x_RH: torch.Tensor, plan: RoutingPlan, experts: Experts, group: ExpertGroup) -> torch.Tensor:
    L, C, H = experts.num_local, plan.capacity, x_RH.size(-1)
    x = all_to_all(x_RH, group.group).view(group.size, L, C, H)  # from each process, the tokens for our experts
    y = experts(x.transpose(0, 1).reshape(L, group.size * C, H))
    y = y.view(L, group.size, C, H).transpose(0, 1).reshape(-1, H)
    return all_to_all(y, group.group)


def _dropless(x_RH: torch.Tensor, plan: RoutingPlan, experts: Experts, group: ExpertGroup) -> torch.Tensor:
    if group.group is None:
        return experts.grouped(x_RH, plan.counts_E.tolist())
    sent_PL = plan.counts_E.view(group.size, experts.num_local)
    received_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=group.group)
    sent, received = sent_PL.sum(1).tolist(), received_PL.sum(1).tolist()
    x = all_to_all(x_RH, group.group, received, sent)
    # rows come by process, then expert; experts want theirs together
    local = torch.arange(experts.num_local, device=x.device).repeat(group.size)
    by_expert = local.repeat_interleave(received_PL.flatten()).argsort(stable=True)
    by_process = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(by_expert), device=x.device))
    y = experts.grouped(_TakeRows.apply(x, by_expert, by_process[:, None]), received_PL.sum(0).tolist())
    y = _TakeRows.apply(y, by_process, by_expert[:, None])
    return all_to_all(y, group.group, sent, received)
