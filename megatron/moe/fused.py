"""Where the Triton kernels take over from plain torch: the top-1 router, and the whole layer if it is on one process.

What they compute is what router, exchange and experts compute in plain torch, the random selection of tokens included.
"""

import torch

from megatron.moe import kernels
from megatron.moe.experts import Experts
from megatron.moe.plan import RoutingPlan
from megatron.moe.router import Router, Routing

MOST_EXPERTS = 1024


def routes(router: Router, x: torch.Tensor) -> bool:
    """Whether :func:`route` can take the place of ``router`` for input ``x``."""
    return (
        router.topk == 1
        and router.num_experts <= MOST_EXPERTS
        and not router.tensor_group.sequence_parallel
        and not (router.training and router.noise_policy is not None)
        and x.numel() > 0
        and kernels.usable(x)
    )


def route(router: Router, x: torch.Tensor) -> Routing:
    """The routing of tokens [..., H]."""
    from megatron.moe.kernels.gate import gate

    capacity = router.capacity(x.numel() // x.size(-1))
    _, found = gate(x.flatten(0, -2).contiguous(), router.weight, capacity, random=_random(router))
    return _routing(found, capacity)


def serves(router: Router, experts: Experts, x: torch.Tensor) -> bool:
    """Whether :func:`serve` can take the place of router, exchange and experts for input ``x``."""
    return (
        routes(router, x)
        and router.tensor_group.size == 1
        and experts.w1.size(0) == router.num_experts
        and router.capacity(x.numel() // x.size(-1)) is not None
        and x.dtype == experts.w1.dtype
    )


def serve(router: Router, experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
    """Weighted answers to ``x`` [..., H] and the routing that they follow."""
    from megatron.moe.kernels.layer import layer

    capacity = router.capacity(x.numel() // x.size(-1))
    weights = (experts.w1, experts.b1, experts.w2, experts.b2)
    y_TH, found = layer(x.flatten(0, -2).contiguous(), router.weight, weights, capacity, random=_random(router))
    return y_TH.view(x.shape), _routing(found, capacity)


def _random(router: Router) -> bool:
    return router.training and router.random_selection


def _routing(found, capacity: int | None) -> Routing:
    expert_TK, gate_TK, slot_TK = (x_T[:, None] for x_T in (found.expert_T.long(), found.gate_T, found.slot_T.long()))
    return Routing(RoutingPlan(expert_TK, gate_TK, slot_TK, found.counts_E, capacity), found.aux_loss, found.z_loss)
