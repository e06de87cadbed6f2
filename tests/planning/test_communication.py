"""Planned traffic against arithmetic by hand; tests/distributed/test_communication.py counts what is really sent."""

import dataclasses

import pytest

from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.planning.communication import communication

# 2 layers, the second with 4 experts; H = 4, F = 16, V = 8, 8 positions; a micro-batch is 2 x 8 = 16 tokens
TINY = {"num_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "seq_length": 8, "num_experts": (4,)}
TINY |= {"micro_batch_size": 2, "global_batch_size": 16, "checkpoint_activations": True}
FEED_FORWARD = 2 * 4 * 16 + 16 + 4
ATTENTION = 4 * 4 * 4 + 4 * 4
DENSE = (8 + 8) * 4 + 2 * (4 * 4 + ATTENTION) + FEED_FORWARD + 4 * 4 + 2 * 4  # tables, layers, router, last norm


def plan(world: int, node: int, **values):
    return communication(build(TINY | values), world, vocab_size=8, node=node)


def test_data_and_expert_parallelism_by_hand():
    """Four ranks, two a node; two share the experts, so the two nodes have the same ones."""
    sent = plan(4, node=2, moe_expert_parallel_size=(2,))
    # reduce-scatter of fp32 gradients and all-gather of bf16 weights, 3/4 of each
    assert sent["dense"].total == (4 + 2) * DENSE * 3 / 4
    assert sent["dense"].between == sent["dense"].total / 2  # in the ring 0 1 | 2 3 every other step leaves the node
    assert sent["experts"].total == (4 + 2) * (2 * FEED_FORWARD) * 1 / 2
    in_bf16 = plan(4, node=2, moe_expert_parallel_size=(2,), grad_reduce_in_bf16=True)
    assert in_bf16["dense"].total == (2 + 2) * DENSE * 3 / 4
    in_fp16 = plan(4, node=2, moe_expert_parallel_size=(2,), precision="fp16")  # DeepSpeed's all-reduce: twice as much
    assert in_fp16["dense"].total == (2 * 4 + 2) * DENSE * 3 / 4
    assert sent["experts"].inside == 0
    # 2 micro-batches: 4 experts x 4 slots x H x 2 bytes go out and come back in three passes, half to the other rank
    assert sent["all-to-all"].total == 2 * 3 * (4 * 4) * 4 * 2 / 2 * 2
    assert sent["all-to-all"].between == 0
    assert sent["tensor"].total == sent["pipeline"].total == 0


def test_experts_across_nodes_by_hand():
    sent = plan(4, node=2, moe_expert_parallel_size=(4,))
    assert sent["experts"].total == 0
    assert sent["all-to-all"].total == 2 * 3 * (4 * 4) * 4 * 2 * 3 / 4 * 2
    assert sent["all-to-all"].between == pytest.approx(sent["all-to-all"].total * 2 / 3)  # two of three others


def test_tensor_and_pipeline_parallelism_by_hand():
    sent = plan(4, node=4, tensor_model_parallel_size=2, num_experts=(1,))
    stream = 16 * 4 * 2  # bytes of a micro-batch's activations
    # two pairs of matrices a layer in three passes, embedding and head; three fp32 numbers a token for the loss
    assert sent["tensor"].total == 4 * (2 * (2 * 3 * 2 + 2) * stream + 2 * 3 * 16 * 4) / 2
    piped = plan(2, node=1, pipeline_model_parallel_size=2, num_experts=(1,))
    # one stage sends 8 activations, the other 8 gradients; the fp32 token table's gradient is added
    assert piped["pipeline"].total == 8 * stream + 8 * 4 * 4
    assert piped["pipeline"].inside == 0
    assert piped["dense"].total == 0


def test_dropless_exchanges_the_assignments():
    sent = plan(4, node=4, moe_expert_parallel_size=(2,), moe_token_dropping=False, topk=2)
    assert sent["all-to-all"].total == 2 * 3 * (16 * 2) * 4 * 2 / 2 * 2


def test_each_degree_counts_for_its_layers():
    layers = {"num_layers": 4, "num_experts": (4, 8)}
    both = plan(8, node=8, moe_expert_parallel_size=(2, 4), **layers)
    one, other = (plan(8, node=8, moe_expert_parallel_size=(d,), **layers | {"num_experts": e}) for d, e in
                  ((2, (4, 1)), (4, (1, 8))))  # fmt: skip
    for what in ("experts", "all-to-all"):
        assert both[what] == one[what] + other[what]


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_runs_send_what_their_layout_says(name):
    config = build(PRESETS[name])
    world = 128 if name == "6.7B+MoE-128" else 64
    sent = communication(config, world, 50304)
    assert sent["dense"].total > 0
    assert (sent["all-to-all"].total > 0) == config.moe.enabled
    assert sent["experts"].total == 0  # all ranks share the experts: no rank has the same ones
    assert (sent["tensor"].total > 0) == (config.parallel.tensor_model_parallel_size > 1)
    assert sent["tensor"].between == 0
    if config.moe.enabled:
        assert sent["all-to-all"].between == pytest.approx(sent["all-to-all"].total * ((56 / 63) if world == 64 else 1))
    without = dataclasses.replace(config.training, checkpoint_activations=False)
    less = communication(dataclasses.replace(config, training=without), world, 50304)
    assert less["all-to-all"].total == pytest.approx(sent["all-to-all"].total * 2 / 3)
