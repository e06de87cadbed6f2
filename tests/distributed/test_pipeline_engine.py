"""Pipelines against a plain torch loop on one process: loss, gradient norm and every parameter."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_engine import BATCH, DENSE, MICRO, SEQ, STEPS, VOCAB, config, micro_batch, reference, whole

from megatron.config import MoEConfig, ParallelConfig, RunConfig

# MoE losses large enough that leaving one stage's out, or scaling it wrongly, changes everything
LOUD = {"moe_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
TOP1 = MoEConfig(num_experts=(4,), moe_min_capacity=1, **LOUD)
EVERY_LAYER = MoEConfig(num_experts=(4,), expert_interval=1, moe_min_capacity=1, **LOUD)
TOP2 = MoEConfig(num_experts=(4, 8), topk=2, **LOUD)
DROPLESS = MoEConfig(num_experts=(8,), moe_token_dropping=False, mlp_type="residual", **LOUD)


def layout(
    moe: MoEConfig, stages: int, expert_parallel: int = 1, precision: str = "fp32", split: str | None = None, **training
) -> RunConfig:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, moe_expert_parallel_size=expert_parallel, pipeline_layer_split=split
    )
    return dataclasses.replace(config(moe, expert_parallel, precision, **training), parallel=parallel)


def build(run: RunConfig):
    """Engine of this process; all processes have met already."""
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    rank = dist.get_rank()
    launch = Launch(rank, dist.get_world_size(), rank, "127.0.0.1", 0, "test")
    return build_engine(run, build_groups(run.parallel, launch, torch.device("cpu")), VOCAB)


def share(engine, first: int, last: int, poison: int | None = None) -> list[dict]:
    """This rank's of the micro-batches ``first`` to ``last`` of the run; all stages of a pipeline get the same."""
    size, rank = engine._topology.data_parallel_size, engine._topology.data_parallel_rank
    return [micro_batch(n, poison=n == poison) for n in range(first, last) if n % size == rank]


def update(engine, step: int, **kwargs):
    count = BATCH // MICRO
    return engine.train_step(share(engine, step * count, (step + 1) * count, **kwargs), (step + 1) * BATCH * SEQ)


def train(runs: list[RunConfig]) -> list:
    """Train each configuration; returns its losses, gradient norms, MoE figures and final parameters."""
    from megatron.parallel.initialize import forget_groups
    from megatron.training.metrics import mean_losses, reduce_sums

    results = []
    for run in runs:
        engine = build(run)
        history, figures = [], []
        for step in range(STEPS):
            outcome = update(engine, step)
            assert not outcome.skipped
            reduced = reduce_sums(outcome.sums)
            losses = mean_losses(reduced)
            history.append((losses["loss"], outcome.grad_norm))
            figures.append(
                (losses["aux_loss"], losses["z_loss"], [c.tolist() for c in reduced.counts], reduced.dropped.tolist())
            )
        results.append((history, whole(engine), figures))
        forget_groups()
    return results if dist.get_rank() == 0 else []


CASES = {
    2: {
        "dense": layout(DENSE, 2),
        "top-1": layout(TOP1, 2),
        "top-1 in every layer, recomputed": layout(EVERY_LAYER, 2, checkpoint_activations=True),
        "top-2": layout(TOP2, 2),
        "dropless residual": layout(DROPLESS, 2, split="3,1"),
    },
    4: {
        "PP4 dense": layout(DENSE, 4),
        "PP4 top-1": layout(TOP1, 4),
        "PP2 x DP2": layout(TOP2, 2),
        "PP2 x EP2 top-1": layout(TOP1, 2, 2),
        "PP2 x EP2 every layer, recomputed": layout(EVERY_LAYER, 2, 2, checkpoint_activations=True),
        "PP2 x EP2 top-2": layout(TOP2, 2, 2),
        "PP2 x EP2 dropless": layout(DROPLESS, 2, 2),
    },
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_pipelines_train_as_plain_torch(size):
    results = run_distributed(train, size, list(CASES[size].values()), timeout=300)[0]
    for (name, run), (history, parameters, _) in zip(CASES[size].items(), results, strict=True):
        expected, weights = reference(run.moe)
        message = f"{name}: {history} against {expected}"
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=message)
        assert parameters.keys() == weights.keys()
        errors = {key: float((parameters[key] - value).abs().max()) for key, value in weights.items()}
        print(name, max(errors.values()), float((torch.tensor(history) - torch.tensor(expected)).abs().max()))
        assert all(error <= 1e-5 for error in errors.values()), f"{name}: {errors}"  # NaN fails too
        assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"
