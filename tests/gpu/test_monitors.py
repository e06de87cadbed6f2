"""Monitors on a GPU: with compiled layers and CUDA graphs they are the same, change nothing, and cost next to nothing.

``python -m pytest -q -s tests/gpu/test_monitors.py`` prints the cost.
"""

import statistics
import time

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_deterministic import assert_same_bits
from distributed.tiny_training import Trained, whole
from gpu import small_training
from gpu.test_cuda_graphs import MODELS, graphs_of, strictly

from megatron.config import LoggingConfig

pytestmark = pytest.mark.gpu
UPDATES = 6
PAIRS = 12  # of intervals, without and with monitors


def train(model: str, graphs: bool, monitored: bool) -> tuple[Trained, list[dict]]:
    moe, options = MODELS[model]
    engine = small_training.build(moe, cuda_graphs=graphs, **options)
    results = []
    for step in range(UPDATES):
        results.append(engine.train_step(small_training.share(step), (step + 1) * 4096, monitored))
    if graphs:
        graphs_of(engine)
    losses = [float(result.sums.losses[0]) for result in results]
    monitors = [result.monitors for result in results if result.monitors is not None]
    return Trained(losses, [result.grad_norm for result in results], whole(engine), []), monitors


def in_every_way(model: str) -> list[tuple[Trained, list[dict]]]:
    return [train(model, graphs, monitored) for graphs, monitored in ((False, False), (False, True), (True, True))]


@pytest.mark.parametrize("model", ["dense", "MoE-8", "MoE-8, recomputed", "MoE-8, norms of Q and K", "MoE-8, noise"])
def test_they_change_no_bit_and_graphs_do_not_change_them(model: str):
    ((without, plain, graphed),) = run_distributed(strictly, 1, in_every_way, model, timeout=400, backend="nccl")
    assert_same_bits([plain[0], graphed[0]], [without[0], without[0]])
    assert without[1] == []
    assert len(plain[1]) == UPDATES
    assert graphed[1] == plain[1]


def interval_seconds(name: str, options: dict) -> list[tuple[float, float]]:
    """Seconds of the updates from one log line to the next, without and with monitors, in turn."""
    from benchmarks.train_step import batch, quick_initial_values
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch
    from megatron.planning.measured import VOCAB, run_of

    run = run_of(name, **options)
    device = torch.device("cuda", 0)
    topology = build_groups(run.parallel, Launch(0, 1, 0, "127.0.0.1", 0, "test"), device)
    with torch.device(device), quick_initial_values():
        engine = build_engine(run, topology, VOCAB)
    batches, tokens = [batch(run, 0)], run.training.global_batch_size * run.model.seq_length
    count = LoggingConfig().log_interval

    def interval(monitored: bool) -> float:
        start = time.perf_counter()
        for number in range(count):
            result = engine.train_step(batches, tokens, monitored and number == count - 1)
        assert result.grad_norm > 0  # the log line waits for the device
        assert (result.monitors is not None) == monitored
        return time.perf_counter() - start

    for monitored in (False, True):
        interval(monitored)
    return [(interval(False), interval(True)) for _ in range(PAIRS)]


@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
@pytest.mark.parametrize("name", ["350M:8", "350M+8:8"])
def test_they_cost_less_than_half_a_percent(name: str, graphs: bool):
    options = {"cuda_graphs": graphs}
    (seconds,) = run_distributed(interval_seconds, 1, name, options, timeout=400, backend="nccl")
    without = statistics.median(pair[0] for pair in seconds)
    more = statistics.median(pair[1] - pair[0] for pair in seconds)
    step, share = 1e3 * without / LoggingConfig().log_interval, more / without
    print(f"\n{name}{' with graphs' * graphs}: {step:.2f} ms a step; {1e3 * more:.2f} ms a log line are {share:.2%}")
    assert share < 0.005
