"""Pipelines against a plain torch loop on one process: loss, gradient norm and every parameter."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_engine import BATCH, DENSE, MICRO, SEQ, STEPS, VOCAB, config, micro_batch, reference, whole

from megatron.config import MoEConfig, RunConfig

# MoE losses large enough that leaving one stage's out, or scaling it wrongly, changes everything
LOUD = {"moe_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
TOP1 = MoEConfig(num_experts=(4,), moe_min_capacity=1, **LOUD)
EVERY_LAYER = MoEConfig(num_experts=(4,), expert_interval=1, moe_min_capacity=1, **LOUD)
TOP2 = MoEConfig(num_experts=(4, 8), topk=2, **LOUD)
DROPLESS = MoEConfig(num_experts=(8,), moe_token_dropping=False, mlp_type="residual", **LOUD)


def layout(
    moe: MoEConfig,
    stages: int,
    expert_parallel: int | tuple = 1,
    precision: str = "fp32",
    split: str | None = None,
    **training,
) -> RunConfig:
    flags = {"pipeline_model_parallel_size": stages, "pipeline_layer_split": split}
    return config(moe, expert_parallel, precision, flags, **training)


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
        assert all(error <= 1e-5 for error in errors.values()), f"{name}: {errors}"  # NaN fails too
        assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"


@pytest.mark.distributed
def test_the_figures_of_all_stages_reach_the_log_and_recomputing_counts_nothing_twice():
    plain, recomputed = (layout(EVERY_LAYER, 2, checkpoint_activations=again) for again in (False, True))
    figures = [result[2] for result in run_distributed(train, 2, [plain, recomputed])[0]]
    expected = run_distributed(train, 1, [layout(EVERY_LAYER, 1)])[0][0][2]
    for found in figures:
        for (aux, z, counts, dropped), (aux_1, z_1, counts_1, dropped_1) in zip(found, expected, strict=True):
            assert aux == pytest.approx(aux_1, rel=1e-5)
            assert z == pytest.approx(z_1, rel=1e-5)
            assert counts == counts_1
            assert dropped == dropped_1
            assert sum(map(sum, counts)) == BATCH * SEQ * len(counts)
            assert sum(dropped) > 0, "nothing was dropped: the capacity of this test is too large to test anything"


@pytest.mark.distributed
def test_bf16():
    history, _, _ = run_distributed(train, 2, [layout(TOP1, 2, precision="bf16")])[0][0]
    losses, expected = (torch.tensor([loss for loss, _ in h]) for h in (history, reference(TOP1)[0]))
    torch.testing.assert_close(losses, expected, rtol=5e-2, atol=5e-2)


def dropout_run(stages: int) -> RunConfig:
    run = layout(TOP1, stages)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_dropout=0.2, attention_dropout=0.2))


@pytest.mark.distributed
def test_dropout_draws_the_same_masks_in_every_pipeline():
    (one,) = run_distributed(train, 1, [dropout_run(1)])[0]
    (two,) = run_distributed(train, 2, [dropout_run(2)])[0]
    without = reference(TOP1)[0]
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(one[0]), rtol=1e-5, atol=1e-5)
    assert max(float((two[1][key] - value).abs().max()) for key, value in one[1].items()) <= 1e-5
    assert abs(one[0][0][0] - without[0][0]) > 1e-3, "dropout does nothing here"


RAMP = (4, 8, 4, 2)  # micro-batches of the run in each update


def ramp_up_and_evaluate(run: RunConfig) -> tuple:
    """Losses and norms of updates of different sizes with an evaluation between them, and the weights."""
    from megatron.training.evaluation import evaluate
    from megatron.training.metrics import mean_losses, reduce_sums

    engine = build(run)
    history, done, valid = [], 0, []
    for count in RAMP:
        outcome = engine.train_step(share(engine, done, done + count), (done + count) * MICRO * SEQ)
        done += count
        history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
        record = evaluate(engine, share(engine, 100, 106))
        valid.append((record["loss"], record["aux_loss"], record["z_loss"], *record["experts"]["load"]))
        assert record["experts"]["dropped"] == [0.0] * len(record["experts"]["dropped"])
    return history, valid, whole(engine)


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "expert_parallel"), [(2, 1), (4, 2)])
def test_a_batch_ramp_up_and_evaluations_are_those_of_one_process(size, expert_parallel):
    history, valid, weights = run_distributed(ramp_up_and_evaluate, 1, layout(TOP1, 1))[0]
    found = run_distributed(ramp_up_and_evaluate, size, layout(TOP1, 2, expert_parallel))
    for rank in found:  # every process knows the figures
        torch.testing.assert_close(torch.tensor(rank[0]), torch.tensor(history), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(rank[1]), torch.tensor(valid), rtol=1e-5, atol=1e-5)
    assert found[0][2].keys() == weights.keys()
    assert max(float((found[0][2][key] - value).abs().max()) for key, value in weights.items()) <= 1e-5


def not_finite(run: RunConfig) -> tuple:
    engine = build(run)
    update(engine, 0)
    before = whole(engine) | whole(engine, "exp_avg.")
    bad = update(engine, 1, poison=BATCH // MICRO)
    after = whole(engine) | whole(engine, "exp_avg.")
    good = update(engine, 2)
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    return bad.skipped, changed, good.skipped, engine.scalar_state()["adam_step"]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_skips_the_update_on_every_stage(precision):
    for result in run_distributed(not_finite, 2, layout(TOP1, 2, precision=precision)):
        assert result == (True, [], False, 2)
