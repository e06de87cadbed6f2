"""The grid's groups are those of Megatron-core's and DeepSpeed's own rank functions; no process is started."""

import time
import tracemalloc
import warnings

import numpy as np
import pytest

from megatron.parallel.grid import Grid

# world, tensor, pipeline, degrees of expert parallelism
SIZES = [
    (12, 2, 3, (1, 2)),
    (128, 1, 1, (1, 8, 64, 128)),
    (128, 8, 1, (1, 4, 16)),
    (128, 2, 4, (2, 8, 16)),
    (1024, 8, 8, (1, 16)),
    (1024, 1, 1, (32, 64)),
    (1024, 4, 2, (64, 128)),
    (16384, 8, 16, (8, 128)),
    (16384, 4, 1, (64, 4096)),
]
EVERY = pytest.mark.parametrize(("world", "tensor", "pipeline", "degrees"), SIZES)


def as_set(groups) -> set[frozenset[int]]:
    return {frozenset(int(rank) for rank in group) for group in groups}


def same(ours: np.ndarray, theirs) -> bool:
    """Equal as lists in our order: ascending inside, by first member outside."""
    return ours.tolist() == sorted(sorted(int(rank) for rank in group) for group in theirs)


@EVERY
def test_groups_are_those_of_megatron_core(world, tensor, pipeline, degrees):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.parallel_state import RankGenerator, default_embedding_ranks

    grid = Grid(world, tensor, pipeline, shard_experts=True)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tensor, ep=1, dp=grid.data, pp=pipeline, cp=1, order=order)
    for kind, token in (("tensor", "tp"), ("pipeline", "pp"), ("data", "dp"), ("model", "tp-pp")):
        assert same(grid.groups(kind), dense.get_ranks(token)), kind
    assert same(grid.groups("embedding"), map(default_embedding_ranks, dense.get_ranks("pp")))
    for degree in degrees:
        experts = RankGenerator(tp=tensor, ep=degree, dp=grid.data // degree, pp=pipeline, cp=1, order=order)
        assert same(grid.groups("expert", degree), experts.get_ranks("ep"))
        assert same(grid.groups("expert_data", degree), experts.get_ranks("dp"))


def deepspeed_groups(monkeypatch, world: int, degree: int, create) -> list[list[int]]:
    """The rank lists for which DeepSpeed makes groups when ``create(groups)`` runs."""
    from deepspeed.utils import groups

    made: list[list[int]] = []
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "get_world_size", lambda group=None: world)
    monkeypatch.setattr(groups.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(groups.dist, "new_group", lambda ranks: made.append(list(ranks)))
    monkeypatch.setattr(groups, "log_dist", lambda *args, **kwargs: None)
    for name in ("PARALLEL_GROUP", "DATA_PARALLEL_GROUP"):
        monkeypatch.setattr(groups, f"_EXPERT_{name}", {})
        monkeypatch.setattr(groups, f"_EXPERT_{name}_RANKS", {})
    create(groups)
    return made


@EVERY
def test_groups_are_those_of_deepspeed(monkeypatch, world, tensor, pipeline, degrees):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils.groups import _get_expert_parallel_ranks

    replicated, sharded = Grid(world, tensor, pipeline), Grid(world, tensor, pipeline, shard_experts=True)
    for degree in degrees:
        expert, expert_data = _get_expert_parallel_ranks(world, tensor, degree, pipeline)
        assert same(sharded.groups("expert", degree), expert)
        assert same(sharded.groups("expert_data", degree), expert_data)
        made = deepspeed_groups(
            monkeypatch,
            world,
            degree,
            lambda groups, d=degree: groups._create_expert_and_data_parallel(d, mp_size=tensor, pp_size=pipeline),
        )
        # with one group of each kind for every rank, the two kinds cannot be mistaken for each other
        both = as_set(replicated.groups("expert", degree)) | as_set(replicated.groups("expert_data", degree))
        assert as_set(made) == both
        assert len(made) == world // degree + pipeline * degree
    if world > 1024:  # DeepSpeed searches all coordinates for each group: quadratic
        return
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=sharded.data)
    for kind, axis in (("tensor", "model"), ("pipeline", "pipe"), ("data", "data")):
        theirs = topology.get_axis_comm_lists(axis)
        assert same(sharded.groups(kind), theirs or [[rank] for rank in range(world)]), kind
    model = [topology.get_axis_list(axis="data", idx=place) for place in range(sharded.data)]
    assert same(sharded.groups("model"), model)


@EVERY
@pytest.mark.parametrize("shard_experts", [False, True])
def test_every_rank_finds_its_own_groups(world, tensor, pipeline, degrees, shard_experts):
    grid = Grid(world, tensor, pipeline, shard_experts)
    kinds = [(kind, 1) for kind in ("tensor", "pipeline", "data", "model")]
    kinds += [(kind, degree) for kind in ("expert", "expert_data") for degree in degrees]
    for kind, degree in kinds:
        groups = grid.groups(kind, degree)
        assert sorted(groups.flatten().tolist()) == list(range(world)), "every rank is in exactly one group"
        for rank in {0, 1, world // 3, world // 2, world - 1}:
            (place,) = np.nonzero((groups == rank).any(1))[0]
            assert grid.group_of(rank, kind, degree) == groups[place].tolist()
    (first,) = np.nonzero((grid.groups("embedding") == 0).any(1))[0]
    assert grid.group_of(0, "embedding") == grid.groups("embedding")[first].tolist()
    if pipeline > 2:
        assert grid.group_of(world // pipeline, "embedding") == []


def test_expert_data_groups_of_replicated_experts_span_the_tensor_ranks():
    groups = Grid(8, tensor=2).groups("expert_data", 2)
    assert groups.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert Grid(8, tensor=2, shard_experts=True).groups("expert_data", 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_groups_of_one_rank_of_16384_take_little_memory():
    grid = Grid(16384, tensor=8, pipeline=16)
    tracemalloc.start()
    begin = time.perf_counter()
    for kind in ("tensor", "pipeline", "model", "expert"):
        assert 9999 in grid.group_of(9999, kind, 128 if kind == "expert" else 1)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, "a rank's own groups take memory for their members only"
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(100, 8, 2), r"world = tensor x pipeline x data .*100 = 8 x 2 x 6 \+ 4; take 96 ranks"),
        (lambda: Grid(4, 8), r"4 = 8 x 1 x 0 \+ 4; take 8 ranks"),
        (lambda: Grid(8, 0), "tensor = 0; a size of a grid is at least 1"),
        (lambda: Grid(24, 2).groups("expert", 8), r"data = expert-parallel x replicas .*degree 8: 12 .*divisor of 12"),
        (lambda: Grid(24, 2).group_of(0, "expert_data", 0), "degree 0"),
        (lambda: Grid(8).group_of(8, "data"), "rank 8 is not from 0 to 7"),
        (lambda: Grid(8).groups("context"), "no kind of group 'context'; there are tensor, pipeline"),
    ],
)
def test_sizes_that_do_not_fit_are_reported_with_the_equation(make, message):
    with pytest.raises(ValueError, match=message):
        make()
