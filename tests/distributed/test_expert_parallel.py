"""Experts spread over 2 and 4 processes compute what one process with all experts does.

The reference runs each rank's micro-batch on its own through a layer that holds every expert, and sums the gradients.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.nodes import build_node_groups

pytestmark = pytest.mark.distributed
H, E, T = 16, 8, 24
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=20, num_attention_heads=2, init_method_std=0.3)


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of one comparison."""

    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: tuple[int, ...] = (T, T, T, T)  # of each rank
    one_expert: bool = False  # the tokens of rank 0 all choose expert 5
    train: bool = True
    dtype: torch.dtype = torch.float32
    chunks: int = 1


DROPLESS = {"moe_token_dropping": False}
CASES = {
    "top-1 capacity": Case(),
    "top-2 capacity": Case({"topk": 2}),
    "top-1 dropless": Case(DROPLESS),
    "top-2 dropless": Case({"topk": 2, **DROPLESS}),
    "top-1 capacity, one expert": Case(one_expert=True),
    "top-2 capacity, one expert": Case({"topk": 2}, one_expert=True),
    "top-1 dropless, one expert": Case(DROPLESS, one_expert=True),
    "top-2 dropless, one expert": Case({"topk": 2, **DROPLESS}, one_expert=True),
    "top-3 residual with noise": Case({"topk": 3, "mlp_type": "residual", "moe_noise_policy": "RSample"}),
    "unequal tokens, none on one rank": Case(DROPLESS, tokens=(5, 0, 1, 9)),
    "evaluation": Case(train=False),
    "evaluation, one token": Case(train=False, tokens=(1, 1, 1, 1)),
    "evaluation with a capacity": Case({"moe_eval_capacity_factor": 0.5}, train=False),
    "float64": Case({"topk": 2}, dtype=torch.float64),
    "bf16 capacity": Case(dtype=torch.bfloat16),
    "bf16 dropless": Case(DROPLESS, dtype=torch.bfloat16),
    "top-1 in 2 chunks": Case(chunks=2),
    "top-2 in chunks of 3, 3 and 2": Case({"topk": 2, "moe_train_capacity_factor": 1.3}, chunks=3),
    "residual, more chunks than slots": Case({"mlp_type": "residual"}, chunks=100),
    "bf16 in chunks": Case(dtype=torch.bfloat16, chunks=2),
    "chunks, evaluation": Case({"moe_eval_capacity_factor": 1.0}, train=False, chunks=2),
    "chunks, evaluation without a capacity": Case(train=False, chunks=2),
}


def make_layer(case: Case, group: ExpertGroup) -> MoELayer:
    config = MoEConfig(num_experts=(E,), moe_min_capacity=2, **case.moe)
    return MoELayer(MODEL, config, E, group, seed=3).to(case.dtype).train(case.train)


def run(case: Case, layer: MoELayer, rank: int) -> dict[str, torch.Tensor]:
    """One micro-batch of one rank, forward and backward; gradients add up in the layer."""
    x = torch.randn(case.tokens[rank], H, generator=torch.Generator().manual_seed(10 + rank))
    if case.one_expert and rank == 0:
        x = x * 0.1 + 5 * layer.router.weight[5].detach()
    x = x.to(case.dtype).requires_grad_()
    torch.manual_seed(20 + rank)  # random token selection and noise, as the trainer seeds each micro-batch
    y, stats = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=case.dtype).view_as(y)
    ((y * weights).sum() / T + stats.aux_loss + 0.1 * stats.z_loss).backward()
    values = {"y": y, **stats._asdict(), "input gradient": x.grad}
    return {name: value.detach() for name, value in values.items()}


def gradients(layer: MoELayer) -> dict[str, torch.Tensor]:
    assert all(parameter.grad is not None for parameter in layer.parameters())
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def on_one_rank() -> dict[str, tuple[dict, dict]]:
    rank, world_size, results = dist.get_rank(), dist.get_world_size(), {}
    for name, case in CASES.items():
        layer = make_layer(case, ExpertGroup(world_size, rank, dist.group.WORLD, overlap_chunks=case.chunks))
        assert layer.experts.w1.size(0) == E // world_size
        results[name] = run(case, layer, rank), gradients(layer)
    return results


def assert_near(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = 1e-6
    if b.dtype == torch.bfloat16 and b.numel():  # products of other shapes round differently
        tolerance = 0.02 * max(b.abs().max().item(), 1e-3)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda message: f"{name}: {message}")


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_spread_experts_equal_one_process(world_size):
    ranks = run_distributed(on_one_rank, world_size)
    for name, case in CASES.items():
        layer = make_layer(case, ExpertGroup(1, 0, None))
        for rank in range(world_size):
            expected = run(case, layer, rank)
            for key, value in ranks[rank][name][0].items():
                assert_near(f"{name}, rank {rank}, {key}", value, expected[key])
            if case.one_expert and rank == 0:
                assert expected["counts_E"][5] == T
            if case.train and "moe_token_dropping" not in case.moe and case.one_expert and rank == 0:
                assert expected["dropped"] > T // 2
        for key, total in gradients(layer).items():
            pieces = [gradient[key] for _, gradient in (ranks[rank][name] for rank in range(world_size))]
            together = torch.cat(pieces) if key.startswith("experts.") else torch.stack(pieces).sum(0)
            assert_near(f"{name}, gradient of {key}", together, total)


def by_node_and_directly(ranks_per_node: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    node_groups = build_node_groups([range(world_size)], [r // ranks_per_node for r in range(world_size)])
    for name, case in CASES.items():
        results = []
        for nodes in (None, node_groups, node_groups):
            layer = make_layer(case, ExpertGroup(world_size, rank, dist.group.WORLD, nodes, case.chunks))
            results.append(run(case, layer, rank % len(case.tokens)) | gradients(layer))
        for other in results[1:]:
            for key, value in results[0].items():
                assert torch.equal(value, other[key]), f"{name}: {key}"


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node"), [(4, 2), pytest.param(8, 4, marks=pytest.mark.exhaustive), (8, 2)]
)
def test_by_way_of_nodes_every_bit_is_as_directly(world_size, ranks_per_node):
    run_distributed(by_node_and_directly, world_size, ranks_per_node)
