"""The routing plan: what the router decides and a dispatcher carries out.

Shapes: T tokens on this rank, K experts of each token, E experts, N = T * K assignments.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Where each token goes, and the weight of each expert's output.

    An assignment is one (token, choice) pair. Its expert is ``expert_TK``, its row in that expert's buffer ``slot_TK``,
    and its weight in the token's output ``gate_TK``. No two assignments share an expert and a slot. With a capacity,
    an assignment whose slot is ``capacity`` or more is dropped, and its gate is 0. Without one
    (dropless), the slots of an expert that gets n assignments are 0 ... n - 1, and none is dropped.

    No [T, E] mask is kept: permute and unpermute are index operations on T * K rows.
    """

    expert_TK: torch.Tensor  # int64
    gate_TK: torch.Tensor  # fp32 or wider; the only field that gradients flow through
    slot_TK: torch.Tensor  # int64
    counts_E: torch.Tensor  # int64, assignments to each expert, before dropping
    capacity: int | None  # rows of each expert's buffer; None: as many as needed
    known_dropped: torch.Tensor | None = None  # ``dropped``, where it has been counted already

    @property
    def dropped(self) -> torch.Tensor:
        """Number of dropped assignments, an int64 scalar."""
        if self.known_dropped is not None:
            return self.known_dropped
        if self.capacity is None:
            return self.counts_E.new_zeros(())
        return (self.counts_E - self.capacity).clamp(min=0).sum()

    def rows_per_expert(self) -> int:
        """The capacity of a plan that has one.

        Raises:
            ValueError: it has none.
        """
        if self.capacity is None:
            raise ValueError("this routing plan has no capacity: experts take as many tokens as are routed to them")
        return self.capacity

    def buffer_row_TK(self, chunk: int | None = None) -> torch.Tensor:
        """Row of each assignment in the [E * capacity] rows of all buffers; the dropped ones get row E * capacity.

        With ``chunk``, the buffers are cut into chunks of so many slots (the last one has what is left), and the rows
        are those of all buffers' first chunks, then of their second ones, and so on.
        """
        C, E = self.rows_per_expert(), self.counts_E.numel()
        if chunk is None:
            row_TK = self.expert_TK * C + self.slot_TK
        else:
            first_TK = self.slot_TK // chunk * chunk
            row_TK = E * first_TK + self.expert_TK * (C - first_TK).clamp(max=chunk) + self.slot_TK - first_TK
        return torch.where(self.slot_TK < C, row_TK, E * C)

    def sorted_row_TK(self) -> torch.Tensor:
        """Row of each assignment when all are sorted by expert (dropless): a permutation of 0 ... N - 1."""
        first_E = self.counts_E.cumsum(0) - self.counts_E
        return first_E[self.expert_TK] + self.slot_TK


class Routing(NamedTuple):
    """The plan of one micro-batch, and the router's losses (scalars in the gates' number format, unscaled)."""

    plan: RoutingPlan
    aux_loss: torch.Tensor
    z_loss: torch.Tensor


def expert_capacity(num_tokens: int, num_experts: int, topk: int, factor: float, min_capacity: int) -> int:
    """Rows of an expert's buffer: max(ceil(T / E * factor * K), min_capacity).

    The product is exact for ``factor`` as it is written in decimal. (DeepSpeed computes it in fp32, and so gives one
    row more for some sizes whose product is whole: 121 rather than 120 for 100 tokens, 2 experts and a factor of 2.4.)
    """
    return max(math.ceil(Fraction(num_tokens * topk, num_experts) * Fraction(str(factor))), min_capacity)


def dropped_by_chance(num_tokens: int, num_experts: int, topk: int, capacity: int) -> float:
    """The share of assignments that find no slot where each goes to any expert with equal chance, for many experts.

    An expert's tokens are then Poisson distributed with mean m = T K / E, and it drops E[max(n - C, 0)] = m P(n >= C) -
    C P(n >= C + 1) of them, where P(n >= k) is the regularized incomplete gamma function at (k, m).
    """
    mean = torch.tensor(num_tokens * topk / num_experts, dtype=torch.float64)
    at_least, more = (torch.special.gammainc(torch.tensor(float(k)).double(), mean) for k in (capacity, capacity + 1))
    return float(at_least - capacity / mean * more)


def count_experts(expert_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Assignments to each expert, int64 [E]. (``torch.bincount`` would wait for the GPU.)"""
    flat_N = expert_TK.flatten()
    return flat_N.new_zeros(num_experts).scatter_add_(0, flat_N, torch.ones_like(flat_N))


def slots(expert_N: torch.Tensor, counts_E: torch.Tensor, priority_N: torch.Tensor | None = None) -> torch.Tensor:
    """Position of each assignment among those to the same expert, int64 [N], counted from 0.

    The lowest ``priority_N`` comes first; equal ones, or all without priorities, in the order given.

    Two stable sorts, by priority and then by expert, bring the assignments of an expert together in order of priority;
    an assignment's position is then its distance from the expert's first.
    """
    if priority_N is None:
        order_N = expert_N.argsort(stable=True)
    else:
        order_N = priority_N.argsort(stable=True)
        order_N = order_N[expert_N[order_N].argsort(stable=True)]
    first_E = counts_E.cumsum(0) - counts_E
    slot_N = torch.arange(expert_N.numel(), device=expert_N.device) - first_E[expert_N[order_N]]
    return torch.empty_like(order_N).scatter_(0, order_N, slot_N)
