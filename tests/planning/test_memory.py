"""Planned memory against peaks measured on a GPU, against the real model's shapes, and against sums by hand."""

import dataclasses

import pytest
import torch

from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.model.gpt import GPTModel
from megatron.parallel.groups import ExpertGroup, TensorGroup
from megatron.parallel.sharding import collect_layouts
from megatron.planning.measured import PEAKS, VOCAB, run_of
from megatron.planning.memory import PARTS, memory
from megatron.planning.parameters import parameters_of_stage
from megatron.planning.placement import place_layers

GB = 1e9


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: peak.run)
def test_within_a_tenth_of_the_measured_peak(peak):
    planned = memory(run_of(peak.run, **peak.options), 1, VOCAB).peak / GB
    assert planned == pytest.approx(peak.gb, rel=0.1)


def test_what_stays_between_updates():
    """Measured on one H200: 5.1 GB for 350M, 58.0 for 1.3B+MoE-8."""
    assert memory(run_of("350M:16"), 1, VOCAB).between / GB == pytest.approx(5.1, rel=0.05)
    assert memory(run_of("1.3B+8:8"), 1, VOCAB).between / GB == pytest.approx(58.0, rel=0.02)


def test_the_end_of_the_backward_pass():
    """Measured on one H200: 66.2 GB for 1.3B+MoE-8; it is the peak where activations are few."""
    run = run_of("1.3B+8:1", checkpoint_activations=True)
    found = memory(run, 1, VOCAB)
    assert found.moment == "backward pass of layer 0"
    assert found.peak / GB == pytest.approx(66.2, rel=0.02)


def test_bytes_a_weight():
    """2 + 4/n + 8/n, and 4 for the sums of gradients unless there is nothing to add."""
    count = 356.1e6

    def bytes_a_weight(world: int = 1, **options) -> float:
        return memory(run_of("350M:1", **options), world, VOCAB).between / count

    assert bytes_a_weight() == pytest.approx(2 + 4 + 8, rel=1e-3)
    assert bytes_a_weight(exp_avg_dtype="bf16") == pytest.approx(2 + 4 + 6, rel=1e-3)
    assert bytes_a_weight(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16") == pytest.approx(2 + 4 + 4, rel=1e-3)
    assert bytes_a_weight(global_batch_size=2) == pytest.approx(2 + 4 + 8 + 4, rel=1e-3)
    assert bytes_a_weight(4, global_batch_size=4) == pytest.approx(2 + 1 + 2 + 4, rel=1e-3)
    assert bytes_a_weight(precision="fp32") == pytest.approx(4 + 4 + 8 + 4, rel=1e-3)


def test_experts_are_spread_over_those_that_have_the_same_ones():
    """On 8 GPUs: 8 experts on 8 GPUs exist once and have no sums; on 2 GPUs four times, with a quarter of the state."""
    values = {"num_experts": (8,), "global_batch_size": 8, "moe_expert_parallel_size": (8,)}
    run = run_of("350M:1", **values)
    expert = 12 * 8 * (8 * 1024**2 + 5 * 1024)
    dense = memory(run_of("350M:1", global_batch_size=8), 8, VOCAB).between + 12 * 8 * 1024 * (2 + 4 + 12 / 8)
    dense -= 12 * (8 * 1024**2 + 5 * 1024) * (2 + 4 + 12 / 8)
    assert memory(run, 8, VOCAB).between == pytest.approx(dense + expert / 8 * (2 + 4 + 8), rel=1e-6)
    run.parallel.moe_expert_parallel_size = (2,)
    assert memory(run, 8, VOCAB).between == pytest.approx(dense + expert / 2 * (2 + 4 + 12 / 4), rel=1e-6)


def test_checkpointing_keeps_inputs_and_one_layer():
    kept = memory(run_of("350M:16"), 1, VOCAB)
    recomputed = memory(run_of("350M:16", checkpoint_activations=True), 1, VOCAB)
    stream = 16 * 2048 * 1024 * 2
    assert (kept.moment, recomputed.moment) == ("loss", "loss")
    assert recomputed.parts["activations"] == 25 * stream
    assert kept.parts["activations"] == pytest.approx(24 * 16.05 * stream, rel=0.01)


def test_a_pipeline_keeps_micro_batches_that_are_under_way():
    values = {"global_batch_size": 64, "pipeline_model_parallel_size": 4, "checkpoint_activations": True}
    run = run_of("350M:2", **values)
    first = memory(dataclasses.replace(run, parallel=dataclasses.replace(run.parallel)), 4, VOCAB)
    assert set(first.parts) == set(PARTS)
    assert first.stage in (0, 3)  # the token tables are there
    assert first.peak < memory(run_of("350M:2", global_batch_size=64, checkpoint_activations=True), 1, VOCAB).peak
    fewer = run_of("350M:2", **values | {"global_batch_size": 2})
    assert memory(fewer, 4, VOCAB).peak < first.peak


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("sharded", [False, True])
def test_parameters_of_a_process_are_those_of_the_real_model(tensor, sharded):
    values = {
        **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "num_experts": (4, 8)},
        **{"mlp_type": "residual", "moe_expert_parallel_size": (2, 4), "tensor_model_parallel_size": tensor},
        "enable_expert_tensor_parallelism": sharded and tensor > 1,
    }
    run = build(values)
    groups = [ExpertGroup(2, 0, None), ExpertGroup(4, 0, None)]
    with torch.device("meta"):
        model = GPTModel(
            run.model,
            run.moe,
            128,
            groups.__getitem__,
            TensorGroup(tensor, 0, None, shard_experts=sharded and tensor > 1),
        )
    found = parameters_of_stage(run, 128, range(4), first=True, last=True)
    experts = dict.fromkeys((2, 4), 0)
    layouts = collect_layouts(model)
    for name, parameter in model.named_parameters():
        if layouts[name].expert_degree is not None:
            experts[layouts[name].expert_degree] += parameter.numel()
    assert found.experts == experts
    assert found.total == sum(p.numel() for p in model.parameters())


def test_stages_add_up_to_the_model_and_a_second_token_table():
    run = build(PRESETS["350M+MoE-128"] | {"pipeline_model_parallel_size": 4, "moe_expert_parallel_size": (1,)})
    whole = parameters_of_stage(run, VOCAB, range(24), first=True, last=True)
    start, stages = 0, []
    for stage, count in enumerate(place_layers(run, VOCAB).layers):
        stages.append(parameters_of_stage(run, VOCAB, range(start, start + count), first=stage == 0, last=stage == 3))
        start += count
    assert sum(stage.total for stage in stages) == whole.total + VOCAB * 1024


def test_dropout_costs_a_byte_for_each_mask():
    run = run_of("350M:16")
    without = memory(run, 1, VOCAB).peak
    run.model.hidden_dropout = 0.1
    assert memory(run, 1, VOCAB).peak - without == (2 * 24 + 1) * 16 * 2048 * 1024
