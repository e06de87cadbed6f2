"""All-to-all of rows between the processes of an expert group: direct, or hierarchical over nodes.

An all-to-all is a sequence of steps, each of which maps rows to rows and has an inverse:

    direct          AllToAllSingle(all)
    hierarchical    TransposeBlocks, AllToAllSingle(inside), TransposeBlocks, AllToAllSingle(across)

Hierarchical (Rajbhandari et al. 2022, section 5.2; Hwang et al. 2022, "2DH"): a row for process (n, m), member m of
node n, is sent to member m of its own node first, which then sends all rows that its node has for (n, m) in one
message. A process sends one message to each other node in place of one to each of its M members: M times fewer and
larger ones. The rows that are received, and their order, are the same.

Shapes: G processes of the group = N nodes x M members, L experts on a process.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron.parallel.groups import ExpertGroup


class AllToAllStep(Protocol):
    """One step of an all-to-all."""

    def output_rows(self, rows: int) -> int:
        """Rows that are received when ``rows`` are sent."""
        ...

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the received rows, and return it."""
        ...

    def inverse(self) -> "AllToAllStep":
        """The step that sends every row back."""
        ...


Steps = Sequence[AllToAllStep]


@dataclasses.dataclass(frozen=True)
class AllToAllSingle:
    """Send ``input_splits[i]`` rows to process i and receive ``output_splits[i]`` from it; None: equal splits."""

    group: dist.ProcessGroup | None
    input_splits: list[int] | None = None
    output_splits: list[int] | None = None

    def output_rows(self, rows: int) -> int:
        """Rows that are received when ``rows`` are sent."""
        return rows if self.output_splits is None else sum(self.output_splits)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the received rows, in the order of the processes, and return it."""
        dist.all_to_all_single(out, x.contiguous(), self.output_splits, self.input_splits, group=self.group)
        return out

    def inverse(self) -> "AllToAllSingle":
        """The step that sends every row back."""
        return AllToAllSingle(self.group, self.output_splits, self.input_splits)


@dataclasses.dataclass(frozen=True)
class TransposeBlocks:
    """Reorder a x b blocks of rows from (a, b) to (b, a). Block (i, j) has ``rows[i][j]`` rows; None: all equal."""

    blocks: tuple[int, int]
    rows: Sequence[Sequence[int]] | None = None

    def output_rows(self, rows: int) -> int:
        """As many."""
        return rows

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the same rows in the other order, and return it."""
        a, b = self.blocks
        if self.rows is None:
            shape = x.size(0) // (a * b), *x.shape[1:]
            out.view(b, a, *shape).copy_(x.view(a, b, *shape).transpose(0, 1))
            return out
        blocks = x.split([rows for row in self.rows for rows in row])
        return torch.cat([blocks[i * b + j] for j in range(b) for i in range(a)], out=out)

    def inverse(self) -> "TransposeBlocks":
        """The step that restores the order."""
        rows = None if self.rows is None else list(zip(*self.rows, strict=True))
        return TransposeBlocks((self.blocks[1], self.blocks[0]), rows)


def all_to_all(steps: Steps, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The rows that this process receives when it sends ``x``; written to ``out`` (:func:`empty_output`) if given."""
    out = empty_output(steps, x) if out is None else out
    for step in steps[:-1]:
        x = step(x, empty_output([step], x))
    return steps[-1](x, out)


def empty_output(steps: Steps, x: torch.Tensor) -> torch.Tensor:
    """Uninitialized memory for the rows that this process receives."""
    return x.new_empty(functools.reduce(lambda rows, step: step.output_rows(rows), steps, x.size(0)), *x.shape[1:])


def inverse(steps: Steps) -> Steps:
    """The all-to-all that sends every row back."""
    return tuple(step.inverse() for step in reversed(steps))


def equal_all_to_all(group: ExpertGroup) -> Steps:
    """All-to-all with equal splits; no step for a single process."""
    if group.size == 1:
        return ()
    by_node = group.node_groups
    if by_node is None:
        return (AllToAllSingle(group.group),)
    N, M = by_node.nodes, by_node.members
    return (
        TransposeBlocks((N, M)),
        AllToAllSingle(by_node.inside),
        TransposeBlocks((M, N)),
        AllToAllSingle(by_node.across),
    )


def uneven_all_to_all(sent_GL: torch.Tensor, group: ExpertGroup) -> tuple[Steps, torch.Tensor]:
    """All-to-all of ``sent_GL[g, l]`` rows to expert l of process g. The host waits for the device once.

    Returns:
        The steps, and on the host the rows that each process sends to each of this process's experts, [G, L].
    """
    if group.size == 1:
        return (), sent_GL.cpu()
    by_node, steps = group.node_groups, equal_all_to_all(group)
    if by_node is None:
        sent_GL, received_GL = torch.stack([sent_GL, all_to_all(steps, sent_GL)]).cpu()
        return (AllToAllSingle(group.group, sent_GL.sum(1).tolist(), received_GL.sum(1).tolist()),), received_GL
    N, M = by_node.nodes, by_node.members
    halfway_GL = all_to_all(steps[:2], sent_GL)  # from each member of this node, to member m of each node
    counts = torch.stack([sent_GL, halfway_GL, all_to_all(steps[2:], halfway_GL)]).cpu()
    rows = counts.sum(-1)
    sent_NM, halfway_MN, received_NM = rows[0].view(N, M), rows[1].view(M, N), rows[2].view(N, M)
    return (
        TransposeBlocks((N, M), sent_NM.tolist()),
        AllToAllSingle(by_node.inside, sent_NM.sum(0).tolist(), halfway_MN.sum(1).tolist()),
        TransposeBlocks((M, N), halfway_MN.tolist()),
        AllToAllSingle(by_node.across, halfway_MN.sum(0).tolist(), received_NM.sum(1).tolist()),
    ), counts[2]
