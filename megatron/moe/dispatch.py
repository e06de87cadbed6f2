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
* :class:`DroplessExchange`: rows sorted by expert, as many as there are, in one trip. Between processes the host reads
  the counts (it waits once).

With ``in_kernels`` rows are gathered and combined by :mod:`megatron.moe.kernels.rows`, else by :class:`IndexMoves`.
Either writes each row that counts exactly once, forward and backward, so the results are deterministic.

Shapes: T tokens on this rank, H hidden, K experts of each token, E experts, L experts on this rank, C capacity,
c slots of a chunk, G processes of the group, R rows on this rank after the exchange, N = T * K assignments.
"""

from collections.abc import Sequence

import torch

from megatron.moe import fused
from megatron.moe.plan import RoutingPlan
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.routes import Route, counted_route, equal_route, undo
from megatron.parallel.trips import Trip


class IndexMoves:
    """Tokens into rows and answers out of them, by index operations of torch.

    The rows are those of all buffers, [E * C], in the order of :meth:`RoutingPlan.buffer_row_TK`; or without a capacity
    all assignments, sorted by expert, [N].
    """

    def __init__(self, plan: RoutingPlan, chunk: int | None = None) -> None:
        self._plan = plan
        self._row_N = (plan.sorted_row_TK() if plan.capacity is None else plan.buffer_row_TK(chunk)).flatten()

    def to_rows(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each assignment's token in its row; 0 in rows of none."""
        x_NH = x_TH[:, None].expand(-1, self._plan.expert_TK.size(1), -1).reshape(-1, x_TH.size(1))
        if self._plan.capacity is None:
            return torch.empty_like(x_NH).index_copy(0, self._row_N, x_NH)
        rows = x_TH.new_zeros(self._plan.counts_E.numel() * self._plan.capacity + 1, x_TH.size(1))
        return rows.index_copy(0, self._row_N, x_NH)[:-1]  # the last one is where dropped assignments go

    def from_rows(self, y: torch.Tensor) -> torch.Tensor:
        """[T, H]: sum over a token's experts of gate * answer, in the gates' format, then in that of the answers."""
        if self._plan.capacity is not None:
            y = torch.cat([y, y.new_zeros(1, y.size(-1))])
        y_TKH = y.index_select(0, self._row_N).view(*self._plan.gate_TK.shape, y.size(-1))
        return (y_TKH * self._plan.gate_TK[..., None]).sum(1).to(y.dtype)


class CapacityExchange:
    """Exchange of one micro-batch in buffers of ``plan.capacity`` rows for each expert."""

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup, *, in_kernels: bool = False) -> None:
        self._plan = plan
        self._G = expert_group.size
        self._route = equal_route(expert_group)
        chunks = min(expert_group.overlap_chunks, plan.capacity) if self._G > 1 else 1
        self._chunk = None if chunks <= 1 else -(-plan.capacity // chunks)  # slots; the last may have fewer
        self._moves = fused.moves(plan, self._chunk) if in_kernels else IndexMoves(plan, self._chunk)

    def dispatch(self, x_TH: torch.Tensor) -> list[Trip]:
        """Send each assignment's token to its slot; a slot that nothing was sent to is 0."""
        rows = self._moves.to_rows(x_TH)
        chunks = (rows,) if self._chunk is None else rows.split(self._plan.counts_E.numel() * self._chunk)
        return [Trip(chunk, self._route) for chunk in chunks]

    def arrive(self, trip: Trip) -> torch.Tensor:
        """The rows of a chunk for this rank's experts, [L, G, c, H]; in memory, those of each process together."""
        x, E = trip.finish(), self._plan.counts_E.numel()
        return x.view(self._G, E // self._G, x.size(0) // E, x.size(-1)).transpose(0, 1)

    def send_back(self, y_LGcH: torch.Tensor) -> Trip:
        """Send the answers to a chunk to the processes that asked."""
        return Trip(y_LGcH.transpose(0, 1).flatten(0, 2), undo(self._route))

    def combine(self, trips: Sequence[Trip]) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates; 0 for dropped assignments."""
        chunks = [trip.finish() for trip in trips]
        return self._moves.from_rows(chunks[0] if len(chunks) == 1 else torch.cat(chunks))


class DroplessExchange:
    """Exchange of one micro-batch in exactly as many rows as there are assignments.

    ``counts_L`` tells how many of the dispatched rows belong to each of this rank's L experts: on the device for a
    process alone, which has read nothing; on the host for several.
    """

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup, *, in_kernels: bool = False) -> None:
        self._plan = plan
        self._in_kernels = in_kernels
        self._moves = fused.moves(plan) if in_kernels else IndexMoves(plan)
        self._route: Route = ()
        self.counts_L = plan.counts_E
        self._by_expert_R = None
        if expert_group.size > 1:
            self._route, received_GL = counted_route(plan.counts_E.view(expert_group.size, -1), expert_group)
            self.counts_L = received_GL.sum(0)
            # Rows arrive sorted by (process, expert). Sorting them by expert keeps the order of processes.
            expert_L = torch.arange(received_GL.size(1)).repeat(expert_group.size)
            arrived_R = expert_L.repeat_interleave(received_GL.flatten())
            self._by_expert_R = arrived_R.argsort(stable=True).int().to(plan.counts_E.device)
            self._by_process_R = self._by_expert_R.argsort().int()

    @property
    def rows_per_expert(self) -> list[int]:
        """``counts_L`` on the host, which waits for it if it is not there."""
        return self.counts_L.tolist()

    def dispatch(self, x_TH: torch.Tensor) -> list[Trip]:
        """Send each assignment's token to its expert's process."""
        return [Trip(self._moves.to_rows(x_TH), self._route)]

    def arrive(self, trip: Trip) -> torch.Tensor:
        """The rows for this rank's experts, [R, H], sorted by expert."""
        x_RH = trip.finish()
        return x_RH if self._by_expert_R is None else self._permute(x_RH, self._by_expert_R, self._by_process_R)

    def send_back(self, y_RH: torch.Tensor) -> Trip:
        """Send the answers to the processes that asked."""
        if self._by_expert_R is not None:
            y_RH = self._permute(y_RH, self._by_process_R, self._by_expert_R)
        return Trip(y_RH, undo(self._route))

    def combine(self, trips: Sequence[Trip]) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates."""
        (trip,) = trips
        return self._moves.from_rows(trip.finish())

    def _permute(self, x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
        """Row ``index_R[r]`` for each r."""
        if self._in_kernels and x_RH.numel():
            return fused.permute(x_RH, index_R, inverse_R)
        return x_RH.index_select(0, index_R)
