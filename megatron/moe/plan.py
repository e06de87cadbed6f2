"""The routing plan: all that dispatch and combine need to know of the router's decision.

Letters: T tokens on this rank, K experts a token, E experts, C capacity.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Which expert processes which token, in which slot of its buffer, and with which weight.

    Nothing here is as large as [T, E].
    """

    expert_TK: torch.Tensor  # int64, the experts of each token
    gate_TK: torch.Tensor  # fp32, weight of each expert's output; 0 where the assignment was dropped
    slot_TK: torch.Tensor  # int64, place among all assignments of the expert; dropped where not below the capacity
    counts_E: torch.Tensor  # int64, assignments of each expert, dropped ones included
    capacity: int | None  # slots of each expert; None: as many as it takes

    @property
    def kept_TK(self) -> torch.Tensor:
        """Bool: the assignments that found a slot."""
        if self.capacity is None:
            return torch.ones_like(self.slot_TK, dtype=torch.bool)
        return self.slot_TK < self.capacity

    @property
    def dropped(self) -> torch.Tensor:
        """Int64 scalar: assignments that found no slot."""
        return (~self.kept_TK).sum()

    @property
    def row_TK(self) -> torch.Tensor:
        """Row of each assignment in the experts' buffers laid one after another; -1 where it was dropped.

        Each buffer has ``capacity`` rows, or without a capacity just as many as the expert has assignments.
        """
        if self.capacity is not None:
            return torch.where(self.kept_TK, self.expert_TK * self.capacity + self.slot_TK, -1)
        first_E = self.counts_E.cumsum(0) - self.counts_E
        return first_E[self.expert_TK] + self.slot_TK


def expert_capacity(tokens: int, num_experts: int, topk: int, factor: float, least: int) -> int:
    """Slots of each expert: max(ceil(tokens / experts * factor * topk), least), but never more than ``tokens``.

    The same as DeepSpeed's, except for the last part: an expert cannot get a token twice.
    """
    wanted = -(-tokens * topk * factor // num_experts)
    return min(max(int(wanted), least), tokens)


def count_assignments(expert_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Assignments of each expert, int64 [E], without asking the device (``bincount`` would)."""
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    return zeros.scatter_add_(0, expert_TK.flatten(), torch.ones_like(expert_TK.flatten()))


def assign_slots(expert_TK: torch.Tensor, counts_E: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Give each assignment its place among those of its expert.

    Args:
        expert_TK: the experts of each token.
        counts_E: assignments of each expert.
        order: the T * K assignments (number t * K + k) from the first to be placed to the last.

    Returns:
        int64 [T, K], from 0 for the first of each expert.
    """
    expert_sorted, by_expert = torch.sort(expert_TK.flatten()[order], stable=True)
    first_E = counts_E.cumsum(0) - counts_E
    place = torch.arange(len(order), device=order.device) - first_E[expert_sorted]
    return torch.empty_like(place).scatter_(0, order[by_expert], place).view_as(expert_TK)
