"""A plan in numbers and in words."""

import dataclasses

import pytest

from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.planning.devices import USABLE, find_device
from megatron.planning.measured import VOCAB, run_of
from megatron.planning.memory import memory
from megatron.planning.parameters import count_parameters
from megatron.planning.plan import Machine, aligned, count, experiment, layout, make_plan, micro_batches, needs
from megatron.planning.time import expected_step

A100, H200 = find_device("A100"), find_device("H200")


def test_a_plan_puts_the_parts_together():
    run = build(PRESETS["350M+MoE-128"])
    plan = make_plan(run, Machine(64, 8, A100), VOCAB)
    assert plan.parameters == count_parameters(run.model, run.moe, VOCAB)
    assert plan.memory == memory(run, 64, VOCAB)
    assert plan.step == expected_step(run, 64, VOCAB, A100)
    assert plan.fits
    assert plan.checkpoint_bytes == 12 * plan.parameters.total


def test_moments_in_bf16_are_saved_as_such():
    plan = make_plan(run_of("350M:4", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"), Machine(1, 1, A100), VOCAB)
    assert plan.checkpoint_bytes == 8 * plan.parameters.total


def test_it_fits_or_it_does_not():
    run = run_of("1.3B+8:8")
    assert not make_plan(run, Machine(1, 1, A100), VOCAB).fits
    assert make_plan(run, Machine(1, 1, H200), VOCAB).fits
    just = make_plan(run, Machine(1, 1, A100), VOCAB).memory.peak / 0.94
    assert make_plan(run, Machine(1, 1, dataclasses.replace(A100, memory=just * 1.001)), VOCAB).fits
    assert not make_plan(run, Machine(1, 1, dataclasses.replace(A100, memory=just * 0.999)), VOCAB).fits


def test_words_of_an_experiment():
    lines = dict(experiment(build(PRESETS["1.3B"]), 64))
    assert lines["model"] == "24 layers, hidden size 2048, 16 heads, sequences of 2048, initial std 0.014"
    assert "experts" not in lines
    assert lines["batch"] == "512 sequences an update (from 32 by 32 over 1.95M sequences)"
    assert lines["schedule"].startswith("300B tokens; learning rate 0.0002 to 2e-05, cosine over 260B, warm-up 375M")
    assert lines["layout"] == "64 processes: DP 16 TP 4, micro-batches 16 of 2"


def test_words_of_what_it_needs():
    plan = make_plan(build(PRESETS["1.3B+MoE-128"]), Machine(64, 8, A100, storage=10e9, price=2.5), VOCAB)
    lines = dict(needs(plan))
    assert lines["parameters"] == "52.5B, 1.32B active for a token"
    assert "of 85 (fits: 94% usable)" in lines["memory"]
    assert f"{plan.step.gpu_hours * 2.5:,.0f} at 2.5 an hour" in lines["time"]
    assert lines["checkpoint"] == f"{12 * plan.parameters.total / 1e9:.1f} GB, 63 s at 10 GB/s"
    assert "all-to-all 4.76" in lines["sent"]
    assert [line.split()[0] for line in aligned(needs(plan)).splitlines()] == list(lines)


def test_an_offloaded_optimizer_takes_cpu_memory():
    """18 bytes a weight over the replicas (docs/memory.md), of which each of these experts has one."""
    run = build(PRESETS["350M+MoE-128"] | {"optimizer_cpu_offload": True})
    experts = 12 * 2 * (8 * 1024**2 + 5 * 1024)  # of a process, in 12 layers
    plan = make_plan(run, Machine(64, 8, A100), VOCAB)
    dense = plan.parameters.total - 64 * experts
    assert plan.memory.cpu == pytest.approx(18 * (experts + dense / 64))
    assert dict(needs(plan))["CPU memory"].startswith("3.7 GB or more a process, 30 for 8 of a node")
    assert "CPU memory" not in dict(needs(make_plan(build(PRESETS["350M+MoE-128"]), Machine(64, 8, A100), VOCAB)))


@pytest.mark.parametrize(
    ("options", "hinted"),
    [({}, True), ({"cuda_graphs": True}, False), ({"precision": "fp16"}, False), ({"micro_batch_size": 16}, False)],
)
def test_graphs_are_named_where_the_gpu_waits_and_they_can_be_used(options, hinted):
    plan = make_plan(run_of("350M:1", **({"global_batch_size": 16} | options)), Machine(1, 1, H200), VOCAB)
    assert dict(needs(plan))["speed"].endswith("; --cuda-graphs leaves out the host") == hinted


def test_graphs_are_not_named_where_their_memory_is_missing():
    """They keep the gradients of a micro-batch, also where these are added up."""
    run = run_of("350M+8:1", global_batch_size=16)
    graphed = dataclasses.replace(run, training=dataclasses.replace(run.training, cuda_graphs=True))
    peaks = [make_plan(each, Machine(1, 1, H200), VOCAB).memory.peak for each in (run, graphed)]
    assert peaks[0] < 0.99 * peaks[1]
    for room, hinted in ((1.01 * peaks[1], True), (0.99 * peaks[1], False)):
        plan = make_plan(run, Machine(1, 1, dataclasses.replace(H200, memory=room / USABLE)), VOCAB)
        assert plan.fits
        assert ("--cuda-graphs" in dict(needs(plan))["speed"]) == hinted


def test_without_a_known_device_there_are_no_times():
    plan = make_plan(run_of("350M:4"), Machine(1, 1), VOCAB)
    assert plan.step is None
    assert plan.fits
    assert set(dict(needs(plan))) == {"parameters", "memory", "FLOPs", "checkpoint"}


@pytest.mark.parametrize(("number", "words"), [(52_471_234_567, "52.5B"), (300e9, "300B"), (375e6, "375M"), (4, "4")])
def test_counts(number, words):
    assert count(number) == words


def test_layouts_in_words():
    run = build(PRESETS["6.7B+MoE-128"])
    assert layout(run, 128) == "DP 16 TP 8 SP ETP, EP 16"
    assert micro_batches(run, 128) == "16 of 4"
