"""What an engine does besides training: skipped updates, batches of changing size, evaluation, replicas that agree."""

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, ETP, PP, SP, TP
from distributed.tiny_training import (
    COUNT,
    MICRO,
    SEQ,
    TOP1,
    build,
    differences,
    reference,
    run_config,
    share,
    update,
    updates,
    whole,
    with_dropout,
)

from megatron.config import RunConfig


def not_finite(*runs: RunConfig) -> list[tuple]:
    """Of each run: one good update, one with a loss that is not finite on one process, and another good one."""
    from megatron.parallel.initialize import forget_groups

    results = []
    for run in runs:
        results.append(_with_a_bad_update(build(run)))
        forget_groups()
    return results


def _with_a_bad_update(engine) -> tuple:
    update(engine, 0)
    before = whole(engine) | whole(engine, "exp_avg.")
    bad = update(engine, 1, poison=COUNT)
    after = whole(engine) | whole(engine, "exp_avg.")
    good = update(engine, 2)
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    return bad.skipped, changed, good.skipped, 0 < good.grad_norm < float("inf"), engine.scalar_state()["adam_step"]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_a_gradient_that_is_not_finite_on_one_process_skips_the_update_on_all(precision: str):
    layouts = ({EP: (2,)}, {PP: 2}, {TP: 2, SP: True})
    for results in run_distributed(not_finite, 2, *(run_config(TOP1, precision, **layout) for layout in layouts)):
        assert results == [(True, [], False, True, 2)] * len(layouts)


RAMP = (8, 24, 16, 4)  # micro-batches of the run in each update


def ramp_up_and_evaluate(run: RunConfig) -> tuple:
    """Losses and norms of updates of different sizes with an evaluation between them, and the weights."""
    from megatron.training.hooks.validation import evaluate
    from megatron.training.metrics import mean_losses, reduce_sums

    engine = build(run)
    history, done, valid = [], 0, []
    for count in RAMP:
        outcome = engine.train_step(share(engine, done, done + count), (done + count) * MICRO * SEQ)
        done += count
        history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
        record = evaluate(engine, share(engine, 100, 104))
        valid.append((record["loss"], record["aux_loss"], record["z_loss"], *record["experts"]["load"]))
        assert record["experts"]["dropped"] == [0.0] * len(record["experts"]["dropped"])
    return history, valid, whole(engine)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, {PP: 2}),
        (2, {EP: (2,)}),
        pytest.param(4, {PP: 2, EP: (2,)}, marks=pytest.mark.exhaustive),
        pytest.param(4, {PP: 2, TP: 2, SP: True}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_batch_ramp_up_and_evaluations_are_those_of_one_process(size: int, layout: dict):
    history, valid, weights = run_distributed(ramp_up_and_evaluate, 1, run_config(TOP1))[0]
    found = run_distributed(ramp_up_and_evaluate, size, run_config(TOP1, **layout))
    for rank in found:  # every process knows the figures
        torch.testing.assert_close(torch.tensor(rank[0]), torch.tensor(history), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(rank[1]), torch.tensor(valid), rtol=1e-5, atol=1e-5)
    assert found[0][2].keys() == weights.keys()
    assert max(float((found[0][2][key] - value).abs().max()) for key, value in weights.items()) <= 1e-5


def train_with_dropout(*runs: RunConfig) -> list[tuple]:
    """Of each run: two updates, this process's pipeline stage, and the weights that tensor-parallel ranks agree on."""
    from megatron.parallel.initialize import forget_groups
    from megatron.parallel.sharding import collect_layouts

    results = []
    for run in runs:
        engine = build(with_dropout(run))
        trained = updates(engine, 0, 2)
        layouts = collect_layouts(engine.model)
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters() if not layouts[name].shards}
        results.append((trained, engine._topology.pipeline_parallel_rank, weights))
        forget_groups()
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(2, {TP: 2}, marks=pytest.mark.exhaustive),
        (2, {TP: 2, SP: True}),
        pytest.param(2, {TP: 2, ETP: True}, marks=pytest.mark.exhaustive),
        pytest.param(4, {PP: 2, TP: 2, SP: True}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_with_dropout_tensor_parallel_replicas_stay_equal_and_recomputing_repeats_the_draws(size: int, layout: dict):
    runs = [run_config(TOP1, recompute=recompute, **layout) for recompute in (False, True)]
    results = run_distributed(train_with_dropout, size, *runs)
    stored, recomputed = [first for first, _ in results], results[0][1][0]
    for trained, stage, weights in stored:
        _, _, others = next(result for result in stored if result[1] == stage)
        assert trained[:2] == stored[0][0][:2]
        assert weights.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert max(differences(recomputed, stored[0][0])) <= 1e-5
    assert abs(stored[0][0].losses[0] - reference(TOP1).losses[0]) > 1e-3, "dropout does nothing here"
