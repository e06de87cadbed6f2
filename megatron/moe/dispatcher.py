"""Dispatchers: send tokens to their experts as a routing plan says, and return the sum of the weighted expert outputs.

Each dispatcher does five steps: permute tokens into the rows of their experts, all-to-all, experts, all-to-all back,
unpermute. What else there is to compute (``overlap``) runs while tokens are on their way to the experts.

* :class:`CapacityDispatcher`: every expert has a buffer of C rows. Shapes depend on sizes only, never on where tokens
  go, so the host need not wait for the device. The buffers may be sent in several chunks: while one is computed, others
  are being sent.
* :class:`DroplessDispatcher`: rows sorted by expert, as many as there are. Between processes the host reads the counts
  (it waits once).
* :class:`megatron.moe.tensor_parallel_dispatcher.TensorParallelDispatcher`: around one of these, for processes that
  share every layer's matrices.

Shapes: T tokens on this rank, H hidden, E experts, L experts on this rank, C capacity, c slots of a chunk, G processes
of the expert group, R rows on this rank after the all-to-all.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from megatron.moe.experts import Experts
from megatron.moe.operations import OperationChoice
from megatron.moe.plan import RoutingPlan
from megatron.parallel.all_to_all import equal_all_to_all, inverse, uneven_all_to_all
from megatron.parallel.async_all_to_all import AsyncAllToAll
from megatron.parallel.groups import ExpertGroup


class Dispatcher(Protocol):
    """The interface of all dispatchers."""

    def __call__(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None = None
    ) -> torch.Tensor:
        """For each token the sum over its assignments of gate * expert output; 0 for dropped ones.

        Args:
            x: tokens [..., H], in the order of the plan. All processes of the expert group must call this together.
            plan: of these tokens.
            experts: the experts on this rank.
            overlap: called once, while tokens are on their way to the experts.

        Returns:
            A tensor of the shape and format of ``x``.
        """
        ...


class CapacityDispatcher:
    """For plans with a capacity. All processes of the group must hold equally many tokens."""

    def __init__(self, group: ExpertGroup, operations: OperationChoice) -> None:
        self._group, self._operations = group, operations
        self._to_experts = equal_all_to_all(group)
        self._from_experts = inverse(self._to_experts)

    def __call__(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None = None
    ) -> torch.Tensor:
        """See :class:`Dispatcher`."""
        x_TH, chunk = x.flatten(0, -2), self._slots_of_a_chunk(plan)
        permutation = self._operations.of("permutation", x_TH).permutation(plan, chunk)
        sent = [
            AsyncAllToAll(rows, self._to_experts)
            for rows in _split(permutation.permute(x_TH), chunk, plan.counts_E.numel())
        ]
        if overlap is not None:
            overlap()
        returned = [self._send_back(experts(self._by_expert(rows.wait(), plan))) for rows in sent]
        outputs = [rows.wait() for rows in returned]
        return permutation.unpermute(outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(x.shape)

    def _slots_of_a_chunk(self, plan: RoutingPlan) -> int | None:
        """None for buffers in one piece; the last chunk may have fewer slots."""
        capacity = plan.rows_per_expert()
        chunks = min(self._group.overlap_chunks, capacity) if self._group.size > 1 else 1
        return None if chunks <= 1 else -(-capacity // chunks)

    def _by_expert(self, x_RH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
        """The received rows of a chunk, [L, G, c, H]; in memory those of each process together."""
        G, E = self._group.size, plan.counts_E.numel()
        return x_RH.view(G, E // G, x_RH.size(0) // E, x_RH.size(-1)).transpose(0, 1)

    def _send_back(self, y_LGcH: torch.Tensor) -> AsyncAllToAll:
        """Send expert outputs to the processes of their tokens."""
        return AsyncAllToAll(y_LGcH.transpose(0, 1).flatten(0, 2), self._from_experts)


def _split(rows: torch.Tensor, chunk: int | None, num_experts: int) -> tuple[torch.Tensor, ...]:
    return (rows,) if chunk is None else rows.split(num_experts * chunk)


class DroplessDispatcher:
    """For plans without a capacity."""

    def __init__(self, group: ExpertGroup, operations: OperationChoice) -> None:
        self._group, self._operations = group, operations

    def __call__(
        self, x: torch.Tensor, plan: RoutingPlan, experts: Experts, overlap: Callable[[], object] | None = None
    ) -> torch.Tensor:
        """See :class:`Dispatcher`."""
        x_TH = x.flatten(0, -2)
        permutation = self._operations.of("permutation", x_TH).permutation(plan)
        if self._group.size == 1:
            rows = AsyncAllToAll(permutation.permute(x_TH), ())
            if overlap is not None:
                overlap()
            return permutation.unpermute(experts.forward_sorted(rows.wait(), plan.counts_E)).view(x.shape)
        to_experts, received_GL = uneven_all_to_all(plan.counts_E.view(self._group.size, -1), self._group)
        by_expert_R, by_process_R = _sorted_by_expert(received_GL, x.device)
        sent = AsyncAllToAll(permutation.permute(x_TH), to_experts)
        if overlap is not None:
            overlap()
        returned = AsyncAllToAll(
            self._reorder(
                experts.forward_sorted(self._reorder(sent.wait(), by_expert_R, by_process_R), received_GL.sum(0)),
                by_process_R,
                by_expert_R,
            ),
            inverse(to_experts),
        )
        return permutation.unpermute(returned.wait()).view(x.shape)

    def _reorder(self, x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
        return self._operations.of("reorder", x_RH).reorder(x_RH, index_R, inverse_R)


def _sorted_by_expert(received_GL: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows are received sorted by (process, expert): the permutation (int32) that sorts them by expert, in the order of
    the processes, and its inverse."""
    expert_L = torch.arange(received_GL.size(1)).repeat(received_GL.size(0))
    received_R = expert_L.repeat_interleave(received_GL.flatten())
    by_expert_R = received_R.argsort(stable=True).int().to(device)
    return by_expert_R, by_expert_R.argsort().int()
