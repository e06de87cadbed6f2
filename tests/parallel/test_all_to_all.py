"""The hierarchical all-to-all gives the same rows in the same order as the direct one, there and back."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.parallel.all_to_all import all_to_all, equal_all_to_all, inverse, uneven_all_to_all
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.nodes import build_node_groups

LOCAL, WIDTH = 3, 2


def exchange(ranks_per_node: int) -> list:
    rank, size = dist.get_rank(), dist.get_world_size()
    node_groups = build_node_groups([range(size)], [r // ranks_per_node for r in range(size)])
    assert (node_groups.nodes, node_groups.members) == (size // ranks_per_node, ranks_per_node)
    groups = [ExpertGroup(size, rank, dist.group.WORLD), ExpertGroup(size, rank, dist.group.WORLD, node_groups)]
    generator = torch.Generator().manual_seed(rank)
    equal = torch.randn(3 * size, WIDTH, generator=generator)
    sent_GL = torch.randint(0, 4, (size, LOCAL), generator=generator)
    sent_GL[torch.rand(size, generator=generator) < 0.3] = 0
    rows = torch.randn(int(sent_GL.sum()), WIDTH, generator=generator)
    results = []
    for group in groups:
        steps = equal_all_to_all(group)
        received = all_to_all(steps, equal)
        uneven, received_GL = uneven_all_to_all(sent_GL, group)
        uneven_received = all_to_all(uneven, rows)
        returned = all_to_all(inverse(steps), received), all_to_all(inverse(uneven), uneven_received)
        assert torch.equal(returned[0], equal)
        assert torch.equal(returned[1], rows)
        results.append([received, received_GL, uneven_received, all_to_all(uneven, rows[:, :0])])
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "ranks_per_node"), [(4, 2), (8, 4), (8, 2)])
def test_hierarchical_equals_direct(size, ranks_per_node):
    for direct, hierarchical in run_distributed(exchange, size, ranks_per_node):
        assert direct[0].numel() > 0
        for a, b in zip(direct, hierarchical, strict=True):
            assert torch.equal(a, b)
