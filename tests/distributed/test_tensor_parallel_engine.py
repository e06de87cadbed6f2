"""Tensor parallelism under the engine against a plain torch loop on one process."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_engine import (
    BATCH,
    CASES,
    DENSE,
    DROPLESS,
    MICRO,
    MODEL,
    MOE,
    MOE_TOP2,
    SEQ,
    build,
    config,
    my_micro_batches,
    reference,
    train,
    whole,
)

from megatron.config import MoEConfig


def tensor(size: int, sequence: bool = False, shard_experts: bool = False) -> dict:
    return {
        "tensor_model_parallel_size": size,
        "sequence_parallel": sequence,
        "enable_expert_tensor_parallelism": shard_experts,
    }


# (processes, layout, expert-parallel size): what is left of the processes is data parallel
LAYOUTS = {
    "TP2": (2, tensor(2), 1),
    "TP2 SP": (2, tensor(2, True), 1),
    "TP2 DP2": (4, tensor(2), 1),
    "TP2 SP DP2": (4, tensor(2, True), 1),
    "TP2 EP2": (4, tensor(2), 2),
    "TP2 SP EP2": (4, tensor(2, True), 2),
    "TP4": (4, tensor(4), 1),
    "TP4 SP": (4, tensor(4, True), 1),
    "ETP2": (2, tensor(2, False, True), 1),
    "ETP2 SP EP2": (4, tensor(2, True, True), 2),
    "ETP4": (4, tensor(4, False, True), 1),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_trains_as_plain_torch(layout):
    size, flags, expert_parallel = LAYOUTS[layout]
    cases = {n: moe for n, (moe, _) in CASES.items() if moe.enabled or not flags["enable_expert_tensor_parallelism"]}
    runs = [config(moe, expert_parallel if moe.enabled else 1, layout=flags) for moe in cases.values()]
    results = run_distributed(train, size, runs, timeout=240)[0]
    for (name, moe), (history, parameters) in zip(cases.items(), results, strict=True):
        expected, weights = reference(moe)
        where = f"{name}, {layout}: {history} against {expected}"
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=where)
        assert parameters.keys() == weights.keys()
        for key, value in weights.items():
            error = (parameters[key] - value).abs().max()
            assert error <= 1e-5, f"{key}: {error}; {where}"  # NaN fails too
        assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [tensor(2), tensor(2, True), tensor(2, True, True)], ids=["TP", "SP", "ETP"])
def test_bf16_and_activation_checkpointing(flags):
    runs = [config(MOE, 2, "bf16", flags), config(MOE, 2, layout=flags, checkpoint_activations=True)]
    bf16, recomputed = run_distributed(train, 4, runs)[0]
    expected, weights = reference(MOE)
    for (history, _), tolerance in ((bf16, 5e-2), (recomputed, 1e-5)):
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    for key, value in weights.items():
        torch.testing.assert_close(recomputed[1][key], value, rtol=1e-5, atol=1e-5)


def train_with_dropout(flags: dict, recompute: bool) -> tuple[list[float], dict, list]:
    """Losses and norms of two updates; this rank's replicated weights; tokens of each expert."""
    run = config(MOE, 1, layout=flags, checkpoint_activations=recompute)
    run.model = dataclasses.replace(MODEL, hidden_dropout=0.2, attention_dropout=0.2)
    engine = build(run)
    history = []
    for step in range(2):
        result = engine.train_step(my_micro_batches(step, model_parallel=2), (step + 1) * BATCH * SEQ)
        history += [float(result.sums.losses[0]), result.grad_norm]
    from megatron.parallel.sharding import shards_of

    replicated = {n: p.detach().clone() for n, p in engine.model.named_parameters() if not shards_of(p)}
    return history, replicated, [int(count) for counts in result.sums.counts for count in counts]


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_dropout_and_random_token_selection_replicas_stay_equal(sequence_parallel):
    stored = run_distributed(train_with_dropout, 2, tensor(2, sequence_parallel), False)
    recomputed = run_distributed(train_with_dropout, 2, tensor(2, sequence_parallel), True)
    (history, weights, counts), (other_history, other_weights, other_counts) = stored
    assert history == other_history
    assert counts == other_counts
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name
    torch.testing.assert_close(torch.tensor(recomputed[0][0]), torch.tensor(history), rtol=1e-5, atol=1e-5)
    assert abs(history[0] / (BATCH // MICRO) - reference(MOE, steps=1)[0][0][0]) > 1e-3  # dropout did something


def steps(engine, first: int, count: int) -> list[tuple[float, float]]:
    from megatron.training.metrics import mean_losses, reduce_sums

    history, size = [], engine._topology.tensor_parallel_size
    for step in range(first, first + count):
        outcome = engine.train_step(my_micro_batches(step, model_parallel=size), (step + 1) * BATCH * SEQ)
        history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
    return history


def save_and_resume(folder: str, moe: MoEConfig, layouts: list[tuple[int, dict]], pairs: list[tuple[int, int]]) -> dict:
    """Losses, norms and all tensors after four updates: uninterrupted, and for each pair of saver and loader."""
    from megatron.checkpoint import load, save
    from megatron.parallel.initialize import forget_groups

    results = {}
    for number in sorted({saver for saver, _ in pairs}):
        expert, flags = layouts[number]
        engine = build(config(moe, expert, layout=flags))
        steps(engine, 0, 2)
        save(f"{folder}/{number}", 2, engine.saved_tensors(), engine.scalar_state())
        results[number] = (steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg_sq."))
        forget_groups()
    for saver, loader in pairs:
        expert, flags = layouts[loader]
        engine = build(config(moe, expert, layout=flags, seed=99))  # all weights must come from the checkpoint
        engine._config.training.seed = config(moe).training.seed
        with engine.loading() as tensors:
            scalars = load(f"{folder}/{saver}", tensors)
        engine.load_scalar_state(scalars)
        results[saver, loader] = (steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg_sq."))
        forget_groups()
    return results if dist.get_rank() == 0 else {}


RESUMES = {
    "dense": (DENSE, [(1, {}), (1, tensor(2, True)), (1, tensor(4))], [(0, 1), (1, 0), (1, 2), (2, 1)]),
    "experts": (MOE_TOP2, [(4, {}), (2, tensor(2)), (1, tensor(4, True, True))], [(0, 1), (1, 0), (1, 2), (2, 0)]),
    "dropless residual": (DROPLESS, [(2, {}), (2, tensor(2, True))], [(0, 1), (1, 0)]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESUMES)
def test_what_one_layout_saved_another_resumes(tmp_path: Path, case: str):
    moe, layouts, pairs = RESUMES[case]
    results = run_distributed(save_and_resume, 4, str(tmp_path), moe, layouts, pairs, timeout=400)[0]
    for saver, loader in pairs:
        where = f"saved by {layouts[saver]}, resumed by {layouts[loader]}"
        found, expected = results[saver, loader], results[saver]
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5, msg=where)
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                error = (mine[name] - value).abs().max()
                assert error <= 1e-5, f"{where}: {name}: {error}"  # NaN fails too
