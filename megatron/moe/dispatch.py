"""Bring tokens to their experts and the answers back, as a routing plan says.

With the experts spread over several processes, rows travel there and back (:class:`megatron.parallel.trips.Trip`). Two
forms with the same four steps:

    trips = exchange.dispatch(x_TH)              # tokens leave
    x = exchange.arrive(trip)                    # rows for this rank's experts
    trip = exchange.send_back(y)                 # the experts' answers leave
    y_TH = exchange.combine(trips)               # each token's answers, weighted

* :class:`CapacityExchange`: every expert has a buffer of C rows. Shapes depend on sizes only, never on where tokens
  go, so the host need not wait for the device. All processes of the group must hold equally many tokens. The buffers
  may travel in several chunks, one trip each: while one is computed, others are under way.
* :class:`DroplessExchange`: rows sorted by expert, as many as there are, in one trip. The host reads the counts (it
  waits once).

Every index operation writes each row that counts exactly once, forward and backward, so the results are deterministic.

Letters: T tokens on this rank, H hidden, K experts of each token, E experts, L experts on this rank, C capacity,
c slots of a chunk, G processes of the group, R rows on this rank after the exchange, N = T * K assignments.
"""

from collections.abc import Sequence

import torch

from megatron.moe.plan import RoutingPlan
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.routes import counted_route, equal_route, undo
from megatron.parallel.trips import Trip


class CapacityExchange:
    """Exchange of one micro-batch in buffers of ``plan.capacity`` rows for each expert."""

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup) -> None:
        self._plan = plan
        self._G = expert_group.size
        self._route = equal_route(expert_group)
        chunks = min(expert_group.overlap_chunks, plan.capacity) if self._G > 1 else 1
        self._chunk = None if chunks <= 1 else -(-plan.capacity // chunks)  # slots; the last may have fewer
        self._row_N = plan.buffer_row_TK(self._chunk).flatten()

    def dispatch(self, x_TH: torch.Tensor) -> list[Trip]:
        """Send each assignment's token to its slot; a slot that nothing was sent to is 0."""
        E, C, H = self._plan.counts_E.numel(), self._plan.capacity, x_TH.size(1)
        rows = x_TH.new_zeros(E * C + 1, H)  # the last one is where dropped assignments go
        rows = rows.index_copy(0, self._row_N, _repeat(x_TH, self._plan))[:-1]
        chunks = (rows,) if self._chunk is None else rows.split(E * self._chunk)
        return [Trip(chunk, self._route) for chunk in chunks]

    def arrive(self, trip: Trip) -> torch.Tensor:
        """The rows of a chunk for this rank's experts, [L, G * c, H]."""
        x = trip.finish()  # from each process its rows for our L experts
        L, c, H = self._plan.counts_E.numel() // self._G, x.size(0) // self._plan.counts_E.numel(), x.size(-1)
        return x.view(self._G, L, c, H).transpose(0, 1).reshape(L, self._G * c, H)

    def send_back(self, y_LRH: torch.Tensor) -> Trip:
        """Send the answers to a chunk to the processes that asked."""
        L, R, H = y_LRH.shape
        y = y_LRH.view(L, self._G, R // self._G, H).transpose(0, 1).reshape(L * R, H)
        return Trip(y, undo(self._route))

    def combine(self, trips: Sequence[Trip]) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates; 0 for dropped assignments."""
        chunks = [trip.finish() for trip in trips]
        rows = torch.cat([*chunks, chunks[0].new_zeros(1, chunks[0].size(-1))])
        return _weighted_sum(rows.index_select(0, self._row_N), self._plan)


class DroplessExchange:
    """Exchange of one micro-batch in exactly as many rows as there are assignments.

    ``rows_per_expert`` tells how many of the dispatched rows belong to each of this rank's L experts.
    """

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup) -> None:
        self._plan = plan
        self._row_N = plan.sorted_row_TK().flatten()
        self._route, received_GL = counted_route(plan.counts_E.view(expert_group.size, -1), expert_group)
        self.rows_per_expert: list[int] = received_GL.sum(0).tolist()
        self._by_expert_R = None
        if expert_group.size > 1:
            # Rows arrive sorted by (process, expert). Sorting them by expert keeps the order of processes.
            expert_L = torch.arange(received_GL.size(1)).repeat(expert_group.size)
            arrived_R = expert_L.repeat_interleave(received_GL.flatten())
            self._by_expert_R = arrived_R.argsort(stable=True).to(plan.counts_E.device)
            self._by_process_R = self._by_expert_R.argsort()

    def dispatch(self, x_TH: torch.Tensor) -> list[Trip]:
        """Send each assignment's token to its expert's process."""
        x_NH = _repeat(x_TH, self._plan)
        return [Trip(torch.empty_like(x_NH).index_copy(0, self._row_N, x_NH), self._route)]

    def arrive(self, trip: Trip) -> torch.Tensor:
        """The rows for this rank's experts, [R, H], sorted by expert."""
        x_RH = trip.finish()
        return x_RH if self._by_expert_R is None else x_RH.index_select(0, self._by_expert_R)

    def send_back(self, y_RH: torch.Tensor) -> Trip:
        """Send the answers to the processes that asked."""
        y_RH = y_RH if self._by_expert_R is None else y_RH.index_select(0, self._by_process_R)
        return Trip(y_RH, undo(self._route))

    def combine(self, trips: Sequence[Trip]) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates."""
        (trip,) = trips
        return _weighted_sum(trip.finish().index_select(0, self._row_N), self._plan)


def _repeat(x_TH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """[N, H]: each token once for each of its experts."""
    return x_TH[:, None].expand(-1, plan.expert_TK.size(1), -1).reshape(-1, x_TH.size(1))


def _weighted_sum(y_NH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """[T, H]: sum over a token's experts of gate * answer, in the gates' format, returned in that of the answers."""
    y_TKH = y_NH.view(*plan.gate_TK.shape, y_NH.size(-1))
    return (y_TKH * plan.gate_TK[..., None]).sum(1).to(y_NH.dtype)
