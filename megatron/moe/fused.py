"""The top-1 MoE layer in Triton kernels, for a layer whose experts are all on this process and have a fixed capacity.

What it computes is what router, exchange and experts compute in plain torch; only which tokens a random selection keeps
is drawn otherwise.
"""

import torch

from megatron.moe import kernels
from megatron.moe.experts import Experts
from megatron.moe.plan import RoutingPlan
from megatron.moe.router import Router, Routing

MOST_EXPERTS = 1024


def applies(router: Router, experts: Experts, x: torch.Tensor) -> bool:
    """Whether :func:`forward` can take the place of the layer's parts for input ``x``."""
    return (
        router.topk == 1
        and router.num_experts <= MOST_EXPERTS
        and router.tensor_group.size == 1
        and experts.w1.size(0) == router.num_experts
        and not (router.training and router.noise_policy is not None)
        and router.capacity(x.numel() // x.size(-1)) is not None
        and x.numel() > 0
        and x.dtype == experts.w1.dtype
        and kernels.usable(x)
    )


def forward(router: Router, experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
    """Weighted answers to ``x`` [..., H] and the routing that they follow."""
    from megatron.moe.kernels.layer import layer

    capacity = router.capacity(x.numel() // x.size(-1))
    random = router.training and router.random_selection
    weights = (experts.w1, experts.b1, experts.w2, experts.b2)
    y_TH, found = layer(x.flatten(0, -2).contiguous(), router.weight, weights, capacity, random=random)
    plan = RoutingPlan(found.expert_T[:, None], found.gate_T[:, None], found.slot_T[:, None], found.counts_E, capacity)
    return y_TH.view(x.shape), Routing(plan, found.aux_loss, found.z_loss)
