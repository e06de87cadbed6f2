"""Tensor-parallel processes follow one routing plan, also when their routers differ in the last bit."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig
from megatron.moe import kernels, torch_ops
from megatron.moe.layer import MoELayer
from megatron.parallel import tensor_collectives
from megatron.parallel.groups import LOCAL_EXPERTS, TensorGroup

H, E, S = 16, 6, 40
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=32, num_attention_heads=2, init_method_std=0.3)


def plans(topk: int, drop: bool, in_kernels: bool, agree: bool) -> list[torch.Tensor]:
    """The plan and the layer's output on this process; the second one prefers other experts by a last bit."""
    kernels._usable_on = lambda device: in_kernels
    if not agree:  # as if nobody saw to it
        tensor_collectives.dist.broadcast = lambda *args, **kwargs: None
    moe = MoEConfig(
        num_experts=(E,), topk=topk, moe_token_dropping=drop, moe_train_capacity_factor=0.75, moe_min_capacity=1
    )
    group = TensorGroup(2, dist.get_rank(), dist.group.WORLD, False, False)
    layer = MoELayer(MODEL, moe, E, LOCAL_EXPERTS, group, seed=3)
    x = torch.randn(1, S, H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight_EH = layer.router.weight
        weight_EH[1::2] = weight_EH[::2]  # pairs of experts that are as good as each other
        if group.rank == 1:
            weight_EH[1::2] = torch.nextafter(weight_EH[1::2], 2 * weight_EH[1::2])
    torch.manual_seed(7)
    operations = layer.operations[True].of("route", x, layer.router.weight)
    assert (operations is not torch_ops) == (in_kernels and topk == 1)
    plan = layer.router(x).plan
    torch.manual_seed(7)
    y, _ = layer(x)
    assert torch.equal(plan.counts_E, torch.bincount(plan.expert_TK.flatten(), minlength=E))
    return [plan.expert_TK, plan.slot_TK, plan.counts_E, plan.dropped, y.detach()]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("topk", "drop", "in_kernels"),
    [(1, True, False), (2, True, False), (3, True, False), (2, False, False), (1, True, True), (1, False, True)],
)
def test_a_router_that_differs_in_its_last_bit_changes_no_plan(topk: int, drop: bool, in_kernels: bool):
    if in_kernels:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels would run on the GPU, and these tensors are on the CPU")
    one, other = run_distributed(plans, 2, topk, drop, in_kernels, True)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.distributed
def test_without_an_agreement_it_would():
    one, other = run_distributed(plans, 2, 1, True, False, False)
    assert not torch.equal(one[0], other[0])
