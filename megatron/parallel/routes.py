"""The ways that rows can take between the processes of a group.

A route is a sequence of steps, each of which maps rows to rows and can be undone:

    direct      Swap(all)
    by node     Regroup, Swap(inside), Regroup, Swap(across)

By node (Rajbhandari et al. 2022, section 5.2; Hwang et al. 2022, "2DH"), a row for place (n, m), member m of node n,
first goes to member m of its own node, which then sends everything that its node has for (n, m) in one message. So a
process sends one message to each other node, and not one to each of its M members: M times fewer and larger ones. What
arrives, and in which order, is the same.

Shapes: G processes of the group = N nodes x M members, L experts on a process.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron.parallel.groups import ExpertGroup


@dataclasses.dataclass(frozen=True)
class Swap:
    """Sends ``sent[i]`` rows to process i of the group and receives ``received[i]`` from it; None: equal pieces."""

    group: dist.ProcessGroup
    sent: Sequence[int] | None = None
    received: Sequence[int] | None = None

    def arriving(self, rows: int) -> int:
        """How many rows arrive here when ``rows`` leave."""
        return rows if self.received is None else sum(self.received)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Fills ``y`` with the received rows, in the order of the processes, and returns it."""
        dist.all_to_all_single(y, x.contiguous(), self.received, self.sent, group=self.group)
        return y

    def undo(self) -> "Swap":
        """The step back."""
        return Swap(self.group, self.received, self.sent)


@dataclasses.dataclass(frozen=True)
class Regroup:
    """Brings a x b blocks from the order (a, b) into the order (b, a); of ``rows[a][b]`` rows, None: equal ones."""

    blocks: tuple[int, int]
    rows: Sequence[Sequence[int]] | None = None

    def arriving(self, rows: int) -> int:
        """All."""
        return rows

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Fills ``y`` with the same rows in the other order, and returns it."""
        a, b = self.blocks
        if self.rows is None:
            shape = x.size(0) // (a * b), *x.shape[1:]
            y.view(b, a, *shape).copy_(x.view(a, b, *shape).transpose(0, 1))
            return y
        blocks = x.split([rows for row in self.rows for rows in row])
        return torch.cat([blocks[i * b + j] for j in range(b) for i in range(a)], out=y)

    def undo(self) -> "Regroup":
        """The step back."""
        rows = None if self.rows is None else list(zip(*self.rows, strict=True))
        return Regroup((self.blocks[1], self.blocks[0]), rows)


Route = Sequence[Swap | Regroup]


def follow(route: Route, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The rows that arrive here when ``x`` leave; ``y`` is what will hold them (:func:`landing`)."""
    y = landing(route, x) if y is None else y
    for step in route[:-1]:
        x = step(x, landing([step], x))
    return route[-1](x, y)


def landing(route: Route, x: torch.Tensor) -> torch.Tensor:
    """Memory for the rows that arrive here."""
    return x.new_empty(functools.reduce(lambda rows, step: step.arriving(rows), route, x.size(0)), *x.shape[1:])


def undo(route: Route) -> Route:
    """The way back."""
    return tuple(step.undo() for step in reversed(route))


def equal_route(group: ExpertGroup) -> Route:
    """The route of equally many rows between any two processes; for a single process no step."""
    if group.size == 1:
        return ()
    by_node = group.node_groups
    if by_node is None:
        return (Swap(group.group),)
    N, M = by_node.nodes, by_node.members
    return Regroup((N, M)), Swap(by_node.inside), Regroup((M, N)), Swap(by_node.across)


def counted_route(sent_GL: torch.Tensor, group: ExpertGroup) -> tuple[Route, torch.Tensor]:
    """The route of ``sent_GL[g, l]`` rows for expert l of process g. The host waits for the device once.

    Returns:
        The route, and on the host the rows that each process sends here for each of this process's experts, [G, L].
    """
    if group.size == 1:
        return (), sent_GL.cpu()
    by_node, route = group.node_groups, equal_route(group)
    if by_node is None:
        sent_GL, received_GL = torch.stack([sent_GL, follow(route, sent_GL)]).cpu()
        return (Swap(group.group, sent_GL.sum(1).tolist(), received_GL.sum(1).tolist()),), received_GL
    N, M = by_node.nodes, by_node.members
    halfway_GL = follow(route[:2], sent_GL)  # of each member of this node, for this place of each node
    counts = torch.stack([sent_GL, halfway_GL, follow(route[2:], halfway_GL)]).cpu()
    rows = counts.sum(-1)
    sent_NM, halfway_MN, received_NM = rows[0].view(N, M), rows[1].view(M, N), rows[2].view(N, M)
    return (
        Regroup((N, M), sent_NM.tolist()),
        Swap(by_node.inside, sent_NM.sum(0).tolist(), halfway_MN.sum(1).tolist()),
        Regroup((M, N), halfway_MN.tolist()),
        Swap(by_node.across, halfway_MN.sum(0).tolist(), received_NM.sum(1).tolist()),
    ), counts[2]
