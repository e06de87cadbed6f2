"""Groups of many ranks, seen from one of them: torch's fake backend has all the bookkeeping and no processes."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.parallel.grid import Grid
from megatron.parallel.initialize import NoDevice, Topology, build_groups, choose_device, forget_groups
from megatron.parallel.launch import Launch


@pytest.fixture
def build(monkeypatch):
    """Builds the groups of one rank of many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda *args, backend=None, **kwargs: new_group(*args, **kwargs))

    def of_rank(rank: int, world: int, **parallel) -> Topology:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return build_groups(ParallelConfig(**parallel), Launch(rank, world, 0, "", 0, "test"), torch.device("cpu"))

    yield of_rank
    forget_groups()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rank", "world", "tensor", "pipeline", "degrees"),
    [(77, 128, 1, 1, (32, 64, 64)), (1000, 1024, 8, 2, (16, 64)), (9999, 16384, 8, 16, (64, 128))],
)
def test_a_rank_of_many_has_its_coordinates_and_groups(build, rank, world, tensor, pipeline, degrees):
    from megatron.core import parallel_state

    begin = time.perf_counter()
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    topology = build(rank, world, moe_expert_parallel_size=degrees, **sizes)
    assert time.perf_counter() - begin < 10
    grid, ranks = Grid(world, tensor, pipeline), dist.get_process_group_ranks
    data = topology.data_parallel_group
    assert ranks(data) == grid.group_of(rank, "data")
    assert ranks(data)[topology.data_parallel_rank] == rank
    assert ranks(topology.model_parallel_group) == grid.group_of(rank, "model")
    for name, size, place, group in (
        ("tensor", tensor, topology.tensor_parallel_rank, topology.tensor_parallel_group),
        ("pipeline", pipeline, topology.pipeline_parallel_rank, topology.pipeline_parallel_group),
    ):
        assert (group is None) == (size == 1)
        if group is not None:
            assert ranks(group) == grid.group_of(rank, name)
            assert ranks(group)[place] == rank
    for place, degree in enumerate(degrees):
        group = topology.expert_group(place)
        assert ranks(group.group) == grid.group_of(rank, "expert", degree)
        assert ranks(group.group)[group.rank] == rank
        assert group.size == degree
        assert ranks(topology.expert_data_group(degree)) == grid.group_of(rank, "expert_data", degree)
    # Megatron-core has the same groups and the same answers
    assert parallel_state.get_data_parallel_group(with_context_parallel=True) is data
    assert parallel_state.get_tensor_model_parallel_world_size() == tensor
    assert parallel_state.get_pipeline_model_parallel_world_size() == pipeline
    assert parallel_state.get_pipeline_model_parallel_rank() == topology.pipeline_parallel_rank
    assert parallel_state.get_data_parallel_world_size() == grid.data
    with pytest.raises(AssertionError, match="not initialized"):  # it knows one degree of expert parallelism
        parallel_state.get_expert_model_parallel_group()


def test_megatron_core_gets_a_single_degree_and_equal_groups_are_shared(build):
    from megatron.core import parallel_state

    topology = build(5, 8, tensor_model_parallel_size=2, enable_expert_tensor_parallelism=True)
    assert topology.expert_group(0) == topology.expert_group(7)
    assert topology.expert_group(0).group is None
    assert topology.expert_data_group(1) is topology.data_parallel_group
    assert parallel_state.get_expert_model_parallel_world_size() == 1
    assert parallel_state.get_expert_data_parallel_group() is topology.data_parallel_group


def test_each_process_has_its_own_gpu_unless_gpus_are_shared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(None, rank).index for rank in range(2)] == [0, 1]
    with pytest.raises(NoDevice, match="process 2 of this node has no GPU of its own: 2 visible; start 2 processes"):
        choose_device(None, 2)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [choose_device("cuda", rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert choose_device("cpu", 3).type == "cpu"
