"""Expected times: measured steps again, and arithmetic that must hold whatever was measured."""

import dataclasses

import pytest

from megatron.config.errors import ConfigError
from megatron.planning.devices import find_device
from megatron.planning.flops import model_flops_per_token
from megatron.planning.measured import HOST_MS, PUBLISHED, STEPS, VOCAB, run_of
from megatron.planning.time import PARTS, expected_step

H200 = find_device("H200")


@pytest.mark.parametrize("name", STEPS)
def test_measured_steps_are_expected(name):
    """Dense ones exactly, for the efficiencies come from them; those with experts follow from other benchmarks."""
    step = expected_step(run_of(name), 1, VOCAB, H200)
    assert step.seconds * 1e3 == pytest.approx(STEPS[name], rel=0.06 if "+" in name else 1e-6)
    assert set(step.parts) == set(PARTS)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        (PUBLISHED | {"cuda_graphs": True}, 2.57),
        (PUBLISHED | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "cuda_graphs": True}, 2.134),
        ({"cuda_graphs": True}, 1.757),
    ],
)
def test_what_the_gpu_does_in_the_published_run_is_expected(options, seconds):
    """64 experts on one H200, as measured (docs/results.md): with dropout and recomputation, and without them."""
    step = expected_step(run_of("350M+64:8:16", **options), 1, VOCAB, H200)
    assert step.seconds == pytest.approx(seconds, rel=0.03)
    assert step.parts["host"] == 0


@pytest.mark.parametrize(
    ("name", "options", "milliseconds"),
    [
        ("1.3B:8", {"optimizer_name": "adamw8bit"}, 288.6),
        ("1.3B+8:8", {"optimizer_name": "adamw8bit"}, 353.8),
        ("1.3B+22:8", {"optimizer_name": "adamw8bit"}, 489.6),
        ("1.3B:8", {"optimizer_cpu_offload": True}, 1484.2),
        ("350M+8:16", {"optimizer_cpu_offload": True}, 1083.1),
    ],
)
def test_updates_of_smaller_optimizer_states_take_longer(name, options, milliseconds):
    """As measured (docs/memory.md)."""
    assert expected_step(run_of(name, **options), 1, VOCAB, H200).seconds * 1e3 == pytest.approx(milliseconds, rel=0.06)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "layers"), [("350M:1:8", 0), ("350M+8:1:8", 12)])
def test_a_gpu_waits_for_the_host_where_micro_batches_are_small(name, layers, recompute):
    """As measured with sequences of 128 tokens; with graphs, or enough tokens, it does not wait."""
    short = run_of(name, seq_length=128, checkpoint_activations=recompute)
    step = expected_step(short, 1, VOCAB, H200)
    dense, experts = HOST_MS[recompute]
    host = 8 * ((24 - layers) * dense + layers * experts) / 1e3
    assert step.seconds - step.parts["update"] == pytest.approx(host)
    graphed = dataclasses.replace(short, training=dataclasses.replace(short.training, cuda_graphs=True))
    assert expected_step(graphed, 1, VOCAB, H200).parts["host"] == 0
    assert expected_step(run_of(name.replace(":1:", ":16:")), 1, VOCAB, H200).parts["host"] == 0


def test_a_gpu_that_exchanges_tokens_does_not_wait_for_the_host_meanwhile():
    """However slow the links are, a micro-batch takes what the host needs, as long as that is more."""
    run = run_of("350M+8:1:8", seq_length=128, global_batch_size=16, moe_expert_parallel_size=(2,))
    parts = [expected_step(run, 2, VOCAB, dataclasses.replace(H200, link=link)).parts for link in (4e11, 1e11)]
    assert parts[0]["host"] > parts[1]["host"] > 0
    assert parts[0]["host"] + parts[0]["all-to-all"] == pytest.approx(parts[1]["host"] + parts[1]["all-to-all"])
    assert expected_step(run, 2, VOCAB, dataclasses.replace(H200, link=1e8)).parts["host"] == 0


def test_dropout_is_shared_by_tensor_parallel_processes_as_its_elements_are():
    """Heads always; pieces of the sequence with sequence parallelism."""
    seconds = {}
    for name, options in {"one": {}, "heads": {}, "sequence": {"sequence_parallel": True}}.items():
        size = 1 if name == "one" else 2
        for kind in ("hidden_dropout", "attention_dropout"):
            run = run_of("350M:4", tensor_model_parallel_size=size, **options, **{kind: 0.1})
            seconds[name, kind] = expected_step(run, size, VOCAB, H200).parts["dropout"]
    assert seconds["heads", "attention_dropout"] == pytest.approx(seconds["one", "attention_dropout"] / 2)
    assert seconds["heads", "hidden_dropout"] == pytest.approx(seconds["one", "hidden_dropout"])
    assert seconds["sequence", "hidden_dropout"] == pytest.approx(seconds["one", "hidden_dropout"] / 2)


def test_a_run_of_given_speed_takes_its_time():
    run = run_of("350M:16", train_tokens=300 * 10**9)
    step = expected_step(run, 1, VOCAB, H200)
    assert step.tokens_per_second == pytest.approx(16 * 2048 / (STEPS["350M:16"] / 1e3))
    assert step.days == pytest.approx(300e9 / step.tokens_per_second / 3600 / 24)
    assert step.gpu_hours == pytest.approx(step.days * 24)
    flops = model_flops_per_token(run.model, run.moe, VOCAB)
    assert step.tflops == pytest.approx(flops * step.tokens_per_second / 1e12)


def test_recomputation_costs_a_third_of_the_layers():
    kept, again = (expected_step(run_of("1.3B:8", checkpoint_activations=x), 1, VOCAB, H200) for x in (False, True))
    head = 3 * 2 * VOCAB * 2048 / model_flops_per_token(run_of("1.3B:8").model, run_of("1.3B:8").moe, VOCAB)
    assert again.parts["recomputation"] == pytest.approx(kept.parts["dense"] * (1 - head) / 3)


def test_a_slower_device_takes_longer_by_its_peak():
    one, other = (expected_step(run_of("1.3B:8"), 1, VOCAB, find_device(name)) for name in ("H200", "A100"))
    assert other.parts["dense"] / one.parts["dense"] == pytest.approx(989.4 / 312.0)
    assert other.parts["update"] / one.parts["update"] == pytest.approx(4.80 / 2.04)


def test_data_parallel_ranks_share_the_batch_and_pay_for_gradients():
    run = run_of("350M:16", global_batch_size=128)
    one, eight = expected_step(run, 1, VOCAB, H200), expected_step(run, 8, VOCAB, H200)
    assert eight.parts["dense"] == pytest.approx(one.parts["dense"] / 8)
    assert one.parts["gradients"] == 0 < eight.parts["gradients"]
    apart = expected_step(run, 8, VOCAB, H200, node=1)
    assert apart.parts["gradients"] > 8 * eight.parts["gradients"]  # a network is so much slower than the links
    faster = expected_step(run, 8, VOCAB, H200.with_network(100e9), node=1)
    assert faster.parts["gradients"] == pytest.approx(apart.parts["gradients"] / 2)


def test_stages_of_a_pipeline_wait_for_each_other():
    """With p even stages and m micro-batches, (p - 1) / (m + p - 1) of the time is idle."""
    run = run_of("350M:1", global_batch_size=16, pipeline_model_parallel_size=2, pipeline_layer_split="12,12")
    step = expected_step(run, 2, VOCAB, dataclasses.replace(H200, link=1e30))
    busy = step.parts["dense"] + step.parts["host"]
    assert step.parts["pipeline"] / (busy + step.parts["pipeline"]) == pytest.approx(1 / 17)


def test_tensor_parallel_ranks_share_a_layer():
    run = run_of("1.3B:8", tensor_model_parallel_size=4)
    step = expected_step(run, 4, VOCAB, H200)
    assert step.parts["dense"] == pytest.approx(expected_step(run_of("1.3B:8"), 1, VOCAB, H200).parts["dense"] / 4)
    assert step.parts["tensor"] > 0


def test_small_buffers_slow_the_experts_down():
    few, many = (expected_step(run_of(name), 1, VOCAB, H200) for name in ("350M+8:8", "350M+128:8"))
    assert few.parts["dense"] < many.parts["dense"] * 1.01  # the routers
    assert few.parts["experts"] < many.parts["experts"]
    dropless = expected_step(run_of("350M+8:8", moe_token_dropping=False), 1, VOCAB, H200)
    assert dropless.parts["experts"] > few.parts["experts"]


def test_products_in_fp32_are_those_without_tf32():
    """NVIDIA's data sheet of the A100: 19.5 TFLOP/s of 312."""
    bf16, fp32 = (
        expected_step(run_of("350M:16", precision=p), 1, VOCAB, find_device("A100")) for p in ("bf16", "fp32")
    )
    assert fp32.parts["dense"] == pytest.approx(bf16.parts["dense"] * 312 / 19.5)
    assert expected_step(run_of("350M:16", precision="fp32"), 1, VOCAB, find_device("V100")).seconds > fp32.seconds


def test_slots_are_computed_full_or_not():
    run = run_of("350M+8:16", moe_train_capacity_factor=2.0)
    twice, once = (expected_step(each, 1, VOCAB, H200).parts["experts"] for each in (run, run_of("350M+8:16")))
    assert twice == pytest.approx(2 * once, rel=0.03)  # larger buffers are faster, or slower, by a little


def test_a_device_without_a_known_peak_is_refused():
    with pytest.raises(ConfigError, match=r"the peak of Tesla V100.* in bf16 is not known"):
        expected_step(run_of("350M:4"), 1, VOCAB, find_device("V100"))
