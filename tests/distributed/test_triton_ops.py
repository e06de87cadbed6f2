"""Two processes that share experts or matrices, with kernels, equal plain torch in float64 between the same processes.

Without a GPU the kernels run in Triton's interpreter. That plain torch in several processes equals one process is
shown in test_expert_parallel.py and tests/parallel/test_tensor_parallel.py.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from gpu.processes import needs_two_gpus

from megatron.config import ModelConfig, MoEConfig
from megatron.moe import kernels, torch_ops
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import LOCAL_EXPERTS, ExpertGroup, TensorGroup
from megatron.parallel.nodes import build_node_groups

pytest.importorskip("triton")
H, E, S = 16, 4, 24
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=32, num_attention_heads=2, init_method_std=0.3)
DROPLESS = {"moe_token_dropping": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of one comparison."""

    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    chunks: int = 1
    by_node: bool = False
    tokens: tuple[int, int] = (S, S)  # of each rank
    tensor: tuple[bool, bool] | None = None  # tensor parallel instead: sequence parallel, shard experts


CASES = {
    "top-1": Case(),
    "top-2": Case({"topk": 2}),
    "top-3 residual in 3 chunks": Case({"topk": 3, "mlp_type": "residual"}, chunks=3),
    "top-1 in 2 chunks by way of nodes": Case(chunks=2, by_node=True),
    "dropless top-1": Case(DROPLESS),
    "dropless top-2": Case({"topk": 2, **DROPLESS}),
    "dropless, no tokens on one rank": Case(DROPLESS, tokens=(S, 0)),
    "tensor parallel": Case(tensor=(False, False)),
    "sequence parallel top-2": Case({"topk": 2}, tensor=(True, False)),
    "sharded experts": Case(tensor=(False, True)),
    "tensor parallel dropless": Case({"topk": 2, **DROPLESS}, tensor=(False, False)),
    "sharded experts dropless": Case({"topk": 2, **DROPLESS}, tensor=(True, True)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_layer(case: Case) -> MoELayer:
    size, rank = dist.get_world_size(), dist.get_rank()
    config = MoEConfig(num_experts=(E,), moe_min_capacity=1, moe_train_capacity_factor=0.75, **case.moe)
    if case.tensor is not None:
        return MoELayer(
            MODEL, config, E, LOCAL_EXPERTS, TensorGroup(size, rank, dist.group.WORLD, *case.tensor), seed=3
        )
    nodes = build_node_groups([range(size)], list(range(size))) if case.by_node else None
    return MoELayer(MODEL, config, E, ExpertGroup(size, rank, dist.group.WORLD, nodes, case.chunks), seed=3)


def run(layer: MoELayer, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(20)
    y, stats = layer(x)
    ((y * dy).sum() + stats.aux_loss + 0.1 * stats.z_loss).backward()
    values = {"y": y, **stats._asdict(), "x's gradient": x.grad}
    return values | {f"{name}'s gradient": p.grad for name, p in layer.named_parameters()}


def errors(device: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Of each case and each value: the norm of the difference to float64, over that of the value."""
    kernels._usable_on = lambda device: True
    rank, found = dist.get_rank(), {}
    for name, case in CASES.items():
        layer = make_layer(case)
        for bias in (layer.experts.b1, layer.experts.b2):
            torch.nn.init.normal_(bias, std=0.3, generator=torch.Generator().manual_seed(1))
        layer = layer.to(device, dtype)
        exact = make_layer(case).to(device).double()  # float64 is for plain torch only
        exact.load_state_dict(layer.state_dict())
        same = 0 if case.tensor is not None and not case.tensor[0] else rank  # tensor-parallel: the same tokens
        generator = torch.Generator().manual_seed(10 + same)
        x, dy = (torch.randn(1, case.tokens[rank], H, generator=generator).to(device, dtype) for _ in range(2))
        assert (layer.operations[True].of("permutation", x) is not torch_ops) == (x.numel() > 0)
        values, expected = run(layer, x, dy), run(exact, x.double(), dy.double())
        found[name] = {}
        for key, value in values.items():
            assert value.shape == expected[key].shape, f"{name}: {key}"
            wanted = expected[key].double()
            found[name][key] = float((value.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))
        if "moe_token_dropping" not in case.moe:
            assert values["dropped"] > 0
    return found


def assert_near(ranks: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    for found in ranks:
        assert found.keys() == CASES.keys()
        for name, values in found.items():
            assert all(error <= tolerance for error in values.values()), f"{name}: {values}"  # NaN fails too


@pytest.mark.exhaustive  # tests/moe/test_triton_ops.py compares the kernels in one process
def test_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    assert_near(run_distributed(errors, 2, "cpu", torch.float32), TOLERANCE[torch.float32])


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_two_gpus(dtype):
    assert_near(run_distributed(errors, 2, "cuda", dtype, backend="nccl"), TOLERANCE[dtype])
