"""What we use of DeepSpeed's inside must be as we think; these fail when an upgrade changes it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig

VOCAB, SEQ, MICRO = 32, 8, 2


def engine(expert_size: int | None = None, clip: float = 1.0, **optimizer):
    from megatron.engine.engine import DeepSpeedEngine
    from megatron.model.gpt import GPTModel
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    rank, size = dist.get_rank(), dist.get_world_size()
    run = RunConfig(
        model=ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=SEQ),
        moe=MoEConfig(num_experts=(4,)),
        parallel=ParallelConfig(moe_expert_parallel_size=(expert_size or min(2, size),)),
        optimizer=OptimizerConfig(clip_grad=clip, **optimizer),
        training=TrainingConfig(train_tokens=10_000, micro_batch_size=MICRO, global_batch_size=MICRO * size),
    )
    topology = build_groups(run.parallel, Launch(rank, size, rank, "127.0.0.1", 0, "test"), torch.device("cpu"))
    return DeepSpeedEngine(GPTModel(run.model, run.moe, VOCAB, topology.expert_group), run, topology)


def batch(rank: int) -> dict:
    text = torch.randint(0, VOCAB, (MICRO, SEQ + 1), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones(MICRO, SEQ)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "sample_index": rank * MICRO}


def inspect() -> dict:
    from megatron.engine.deepspeed_internals import SHARED_MEMORY_OP, fragments

    made = engine()
    import deepspeed.ops

    made.train_step([batch(dist.get_rank())], SEQ)
    pieces, moved, faithful = {}, 0.0, True
    for name, parameter, fragment in fragments(made.model, made._sharded_optimizer):
        if fragment is None:
            continue
        pieces[name] = (fragment.start, fragment.numel, parameter.numel())
        weights = parameter.detach().flatten()[fragment.start : fragment.start + fragment.numel]
        faithful &= torch.equal(fragment.master.to(parameter.dtype), weights)
        moved += float(fragment.states["exp_avg"].abs().sum()) * float(fragment.states["exp_avg_sq"].sum())
    return {
        "pieces": pieces,
        "faithful": faithful,
        "moved": moved,
        "sees experts": made._engine.has_moe_layers,
        "compiled": deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP],
        "stage": made._engine.zero_optimization_stage(),
        "timed": made._engine.tput_timer.config.enabled or made._engine.engine_timers.active_timers(),
        "step": {float(state["step"]) for state in made._sharded_optimizer.state.values()},
    }


@pytest.fixture(scope="module")
def seen() -> list[dict]:
    return run_distributed(inspect, 4)


def test_the_installed_version_is_the_one_this_was_written_for():
    pinned = re.search(r"deepspeed==([\d.]+)", (Path(__file__).parents[2] / "setup.py").read_text())
    assert version("deepspeed") == pinned.group(1)


@pytest.mark.distributed
def test_fragments_of_all_ranks_cover_each_parameter_once(seen):
    names = {name for rank in seen for name in rank["pieces"]}
    for name in names:
        total = next(rank["pieces"][name][2] for rank in seen if name in rank["pieces"])
        # ranks 0 and 2 hold one half of the experts, 1 and 3 the other; everything else is shared by all four
        for holders in ([seen[0], seen[2]], [seen[1], seen[3]]) if ".experts." in name else (seen,):
            ranges = sorted(rank["pieces"][name][:2] for rank in holders if name in rank["pieces"])
            end = 0
            for start, numel in ranges:
                assert start == end, name
                end = start + numel
            assert end == total, name


@pytest.mark.distributed
def test_fragments_are_views_of_what_the_optimizer_updates(seen):
    for rank in seen:
        assert rank["faithful"]
        assert rank["moved"] > 0
        assert rank["step"] == {1.0}


@pytest.mark.distributed
def test_deepspeed_runs_zero_1_knows_of_the_experts_and_compiles_nothing(seen):
    for rank in seen:
        assert rank["sees experts"]
        assert rank["stage"] == 1
        assert not rank["timed"], "DeepSpeed's timers wait for the device"
        assert rank["compiled"] is False


# (tensor, degrees, experts sharded, groups of each degree: expert-parallel and expert-data)
NEIGHBOURS, OPPOSITE, ALONE, ALL = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]
EXPERT_GROUPS = [
    (1, (2,), False, [(NEIGHBOURS, OPPOSITE)]),
    (2, (2,), True, [(OPPOSITE, ALONE)]),
    (2, (1,), True, [(ALONE, OPPOSITE)]),
    (2, (2, 1), False, [(OPPOSITE, NEIGHBOURS), (ALONE, ALL)]),  # expert-data groups join the tensor-parallel ranks
    (1, (2, 4), False, [(NEIGHBOURS, OPPOSITE), (ALL, ALONE)]),
]


def find_expert_groups() -> None:
    from deepspeed.utils import groups

    from megatron.engine import deepspeed_internals
    from megatron.parallel.initialize import build_groups, forget_groups
    from megatron.parallel.launch import Launch

    rank, size = dist.get_rank(), dist.get_world_size()
    deepspeed_internals.start()
    for tensor, degrees, sharded, expected in EXPERT_GROUPS:
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            moe_expert_parallel_size=degrees,
            enable_expert_tensor_parallelism=sharded,
        )
        topology = build_groups(parallel, Launch(rank, size, rank, "127.0.0.1", 0, "test"), torch.device("cpu"))
        made = dist.distributed_c10d._world.group_count
        deepspeed_internals.register_groups(topology, deepspeed_internals.ModelParallelUnit(topology), degrees)
        assert dist.distributed_c10d._world.group_count == made, "no group is made a second time"
        assert groups._get_expert_model_parallel_world_size() == (tensor if sharded else 1)
        assert len(groups._get_expert_parallel_group_dict()) == len(degrees), "those of the run before are gone"
        for degree, (members, replicas) in zip(degrees, expected, strict=True):
            name = deepspeed_internals.expert_group_name(degree)
            expert, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
            assert expert is topology.expert_parallel_groups[degree]
            assert data is topology.expert_data_group(degree)
            assert [dist.get_process_group_ranks(expert)] == [group for group in members if rank in group]
            assert [dist.get_process_group_ranks(data)] == [group for group in replicas if rank in group]
            assert groups._get_expert_data_parallel_group_ranks(name) == dist.get_process_group_ranks(data)
        forget_groups()


@pytest.mark.distributed
def test_deepspeed_finds_our_expert_groups():
    run_distributed(find_expert_groups, 4)


def inspect_pipeline() -> dict:
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    rank, size = dist.get_rank(), dist.get_world_size()
    run = RunConfig(
        model=ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=SEQ),
        moe=MoEConfig(num_experts=(4,)),
        parallel=ParallelConfig(pipeline_model_parallel_size=2, moe_expert_parallel_size=(2,)),
        training=TrainingConfig(train_tokens=10_000, micro_batch_size=MICRO, global_batch_size=MICRO * size),
    )
    topology = build_groups(run.parallel, Launch(rank, size, rank, "127.0.0.1", 0, "test"), torch.device("cpu"))
    made = build_engine(run, topology, VOCAB)
    steps = []
    for count in (3, 1):
        made.train_step([batch(number) for number in range(count)], SEQ)
        steps.append((made._engine.micro_batches, made._engine.gradient_accumulation_steps()))
    grid = made._module.mpu()
    from deepspeed.utils import groups

    def ranks(group) -> list[int]:
        return dist.get_process_group_ranks(group)

    return {
        "steps": steps,
        "stage": (grid.get_stage_id(), topology.pipeline_parallel_rank),
        "data": (ranks(grid.get_data_parallel_group()), ranks(topology.data_parallel_group)),
        "experts": (ranks(groups._get_expert_parallel_group("ep_size_2")), ranks(topology.expert_parallel_groups[2])),
        "optimizer groups": [
            (group["expert_degree"], group["matrices"]) for group in made._sharded_optimizer.param_groups
        ],
        "has experts": any(".experts." in name for name, _ in made.model.named_parameters()),
        "saved": {tensor.name for tensor in made.saved_tensors()},
        "names": {name for name, _ in made.model.named_parameters()},
        "marker": [float(p.abs().sum()) for p in made._module.marker.parameters()],
    }


@pytest.mark.distributed
def test_a_pipeline_has_our_groups_our_steps_and_one_token_table_too_many():
    stages = run_distributed(inspect_pipeline, 4)
    for seen in stages:
        assert seen["steps"] == [(3, 3), (1, 1)]
        for name in ("stage", "data", "experts"):
            theirs, ours = seen[name]
            assert theirs == ours, name
        # the gradient norm is reduced group by group, so each stage must have as many, in the same order
        assert seen["optimizer groups"] == [(None, True), (None, False), (2, True), (2, False)]
    first, last = stages[0], stages[3]
    assert (first["has experts"], last["has experts"]) == (False, True)
    assert first["marker"] == [0.0, 0.0]
    assert last["marker"] == []
    assert first["names"] & last["names"] == {"embedding.word_embeddings.weight"}
    saved = set.union(*(seen["saved"] for seen in stages))
    for name in (f"{prefix}.embedding.word_embeddings.weight" for prefix in ("model", "exp_avg", "exp_avg_sq")):
        assert name in saved
        assert name not in last["saved"]


def test_what_offloading_overrides_is_there():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from megatron.engine.deepspeed_internals import offload_from_where_gradients_are_reduced

    assert callable(DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer)
    assert torch.optim.AdamW in ZERO_SUPPORTED_OPTIMIZERS
    offload_from_where_gradients_are_reduced(torch.optim.AdamW([torch.zeros(1)]))  # nothing to do
