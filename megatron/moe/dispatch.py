"""Bring tokens to their experts and the answers back, as a routing plan says.

With the experts spread over several processes, one all-to-all takes the tokens there and another brings the answers
back. Two forms with the same two steps, ``dispatch`` and ``combine``:

* :class:`CapacityExchange`: every expert has a buffer of C rows. Shapes depend on sizes only, never on where tokens
  go, so the host need not wait for the device. All processes of the group must hold equally many tokens.
* :class:`DroplessExchange`: rows sorted by expert, as many as there are. The host reads the counts (it waits once).

Every index operation writes each row that counts exactly once, forward and backward, so the results are deterministic.

Letters: T tokens on this rank, H hidden, K experts of each token, E experts, L experts on this rank, C capacity,
G processes of the group, R rows on this rank after the exchange, N = T * K assignments.
"""

import torch

from megatron.moe.plan import RoutingPlan
from megatron.parallel.collectives import all_to_all
from megatron.parallel.groups import ExpertGroup


class CapacityExchange:
    """Exchange of one micro-batch in buffers of ``plan.capacity`` rows for each expert."""

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup) -> None:
        self._plan = plan
        self._group = expert_group
        self._row_N = plan.buffer_row_TK().flatten()

    def dispatch(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The rows for this rank's experts, [L, G * C, H]; a row that nothing was sent to is 0."""
        E, C, H, G = self._plan.counts_E.numel(), self._plan.capacity, x_TH.size(1), self._group.size
        rows = x_TH.new_zeros(E * C + 1, H)  # the last one is where dropped assignments go
        buffer_ECH = rows.index_copy(0, self._row_N, _repeat(x_TH, self._plan))[:-1].view(E, C, H)
        if G == 1:
            return buffer_ECH
        received_ECH = all_to_all(buffer_ECH, self._group.group)  # from each process its rows for our L experts
        return received_ECH.view(G, E // G, C, H).transpose(0, 1).reshape(E // G, G * C, H)

    def combine(self, y_LRH: torch.Tensor) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates; 0 for dropped assignments."""
        E, C, H, G = self._plan.counts_E.numel(), self._plan.capacity, y_LRH.size(-1), self._group.size
        if G > 1:
            y_ECH = y_LRH.view(E // G, G, C, H).transpose(0, 1).reshape(E, C, H)
            y_LRH = all_to_all(y_ECH, self._group.group)
        rows = torch.cat([y_LRH.reshape(E * C, H), y_LRH.new_zeros(1, H)])
        return _weighted_sum(rows.index_select(0, self._row_N), self._plan)


class DroplessExchange:
    """Exchange of one micro-batch in exactly as many rows as there are assignments.

    ``rows_per_expert`` tells how many of the dispatched rows belong to each of this rank's L experts.
    """

    def __init__(self, plan: RoutingPlan, expert_group: ExpertGroup) -> None:
        self._plan = plan
        self._group = expert_group
        self._row_N = plan.sorted_row_TK().flatten()
        if expert_group.size == 1:
            self.rows_per_expert: list[int] = plan.counts_E.tolist()
            return
        sent_GL = plan.counts_E.view(expert_group.size, -1)
        received_GL = all_to_all(sent_GL, expert_group.group)
        host = torch.stack([sent_GL, received_GL]).cpu()
        self._sent, self._received = host.sum(-1).tolist()
        self.rows_per_expert = host[1].sum(0).tolist()
        # Rows arrive sorted by (process, expert). Sorting them by expert keeps the order of processes.
        expert_L = torch.arange(sent_GL.size(1)).repeat(expert_group.size)
        arrived_R = expert_L.repeat_interleave(host[1].flatten())
        self._by_expert_R = arrived_R.argsort(stable=True).to(plan.counts_E.device)
        self._by_process_R = self._by_expert_R.argsort()

    def dispatch(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The rows for this rank's experts, [R, H], sorted by expert."""
        x_NH = _repeat(x_TH, self._plan)
        x_NH = torch.empty_like(x_NH).index_copy(0, self._row_N, x_NH)
        if self._group.size == 1:
            return x_NH
        x_RH = all_to_all(x_NH, self._group.group, self._received, self._sent)
        return x_RH.index_select(0, self._by_expert_R)

    def combine(self, y_RH: torch.Tensor) -> torch.Tensor:
        """The output of each token, [T, H]: its experts' answers times their gates."""
        if self._group.size > 1:
            y_RH = y_RH.index_select(0, self._by_process_R)
            y_RH = all_to_all(y_RH, self._group.group, self._sent, self._received)
        return _weighted_sum(y_RH.index_select(0, self._row_N), self._plan)


def _repeat(x_TH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """[N, H]: each token once for each of its experts."""
    return x_TH[:, None].expand(-1, plan.expert_TK.size(1), -1).reshape(-1, x_TH.size(1))


def _weighted_sum(y_NH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """[T, H]: sum over a token's experts of gate * answer, in the gates' format, returned in that of the answers."""
    y_TKH = y_NH.view(*plan.gate_TK.shape, y_NH.size(-1))
    return (y_TKH * plan.gate_TK[..., None]).sum(1).to(y_NH.dtype)
