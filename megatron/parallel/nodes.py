"""Process groups of an expert group by node: those inside each node, and those across nodes."""

import datetime
import logging
from collections.abc import Sequence

import torch.distributed as dist

from megatron.parallel.groups import NodeGroups, member_group

logger = logging.getLogger(__name__)


def gather_node_groups(
    expert_group: Sequence[int], node: int, control_group: dist.ProcessGroup, timeout: datetime.timedelta
) -> NodeGroups | None:
    """Node groups of this rank's expert group, given its ranks in order and the number of this rank's node.

    Every rank of the run must call this. None, with one line in the log, if any expert group cannot be cut by node.
    """
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (node, tuple(expert_group)), group=control_group)
    node_of = [node for node, _ in gathered]
    expert_groups = list(dict.fromkeys(ranks for _, ranks in gathered))
    return build_node_groups(expert_groups, node_of, timeout)


def build_node_groups(
    expert_groups: Sequence[Sequence[int]], node_of: Sequence[int], timeout: datetime.timedelta | None = None
) -> NodeGroups | None:
    """Build the node groups of all ``expert_groups``; returns this rank's.

    Every rank of the run must call this with the same arguments.

    Args:
        expert_groups: the ranks of each group in order; every rank of the run is in one.
        node_of: for each rank of the run, the number of its node.
        timeout: of the groups' collectives; torch's default if None.

    Returns:
        None, with one line in the log, if one of the groups cannot be cut by node: then none is.
    """
    try:
        grids = [split_by_node(ranks, node_of) for ranks in expert_groups]
    except ValueError as error:
        if dist.get_rank() == 0:
            logger.warning("--moe-hierarchical-all-to-all has no effect: %s", error)
        return None
    mine = None
    for grid in grids:
        inside = [dist.new_group(list(ranks), timeout=timeout) for ranks in grid]
        across = [dist.new_group(list(ranks), timeout=timeout) for ranks in zip(*grid, strict=True)]
        for node, ranks in enumerate(grid):
            if dist.get_rank() in ranks:
                member = ranks.index(dist.get_rank())
                mine = NodeGroups(len(grid), len(ranks), member_group(inside[node]), member_group(across[member]))
    return mine


def split_by_node(ranks: Sequence[int], node_of: Sequence[int]) -> list[list[int]]:
    """The ranks of an expert group as a grid: one row for each node, in order.

    Raises:
        ValueError: it is not a grid, or one with a single row or column, which leaves nothing to gain.
    """
    grid: dict[int, list[int]] = {}
    for rank in ranks:
        grid.setdefault(node_of[rank], []).append(rank)
    rows = list(grid.values())
    what = f"the expert-parallel group of ranks {_words(ranks)}"
    if len(rows) == 1:
        raise ValueError(f"{what} is on one node")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{what} has {_words([len(row) for row in rows])} ranks on its {len(rows)} nodes, not equally many"
        )
    if len(rows[0]) == 1:
        raise ValueError(f"{what} has one rank on each node, so a plain all-to-all sends the same messages")
    if [rank for row in rows for rank in row] != list(ranks):
        raise ValueError(f"{what} does not go node by node; number ranks so, with srun: --distribution=block")
    return rows


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 16 else f"{numbers[0]} to {numbers[-1]}"
