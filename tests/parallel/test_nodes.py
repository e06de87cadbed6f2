"""Splitting an expert group by node, and the reasons why it cannot be split."""

import logging

import pytest
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.parallel.nodes import build_node_groups, split_by_node


def test_one_row_for_each_node_in_order():
    assert split_by_node(range(8), [0, 0, 0, 0, 1, 1, 1, 1]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split_by_node([1, 3, 5, 7], [9, 9, 9, 9, 4, 4, 4, 4]) == [[1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("node_of", "message"),
    [
        ([0, 0, 0, 0], "ranks 0, 1, 2, 3 is on one node"),
        ([0, 0, 0, 1], "has 3, 1 ranks on its 2 nodes, not equally many"),
        ([0, 1, 2, 3], "has one rank on each node"),
        ([0, 1, 0, 1], "does not go node by node; number ranks so, with srun: --distribution=block"),
    ],
)
def test_groups_that_cannot_be_split_by_node(node_of, message):
    with pytest.raises(ValueError, match=message):
        split_by_node(range(4), node_of)


def build() -> tuple[list[str], list]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron.parallel.nodes").addHandler(handler)
    assert build_node_groups([[0, 1, 2, 3]], [0, 0, 0, 1]) is None
    assert build_node_groups([[0, 1], [2, 3]], [0, 1, 2, 3]) is None  # one of the groups would do, and all know
    groups = build_node_groups([[0, 1, 2, 3]], [7, 7, 5, 5])
    ranks = [dist.get_process_group_ranks(group) for group in (groups.inside, groups.across)]
    return lines, [groups.nodes, groups.members, *ranks]


@pytest.mark.distributed
def test_each_rank_gets_its_groups_and_rank_0_logs_why_there_are_none():
    results = run_distributed(build, 4)
    lines = results[0][0]
    assert len(lines) == 2
    assert "3, 1 ranks" in lines[0]
    assert [other for other, _ in results[1:]] == [[], [], []]
    assert [found for _, found in results] == [
        [2, 2, [0, 1], [0, 2]],
        [2, 2, [0, 1], [1, 3]],
        [2, 2, [2, 3], [0, 2]],
        [2, 2, [2, 3], [1, 3]],
    ]
