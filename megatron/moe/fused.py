"""Where the Triton kernels take over from plain torch.

    serves, serve      the whole top-1 layer with a capacity, if it is on one process
    routes, route      the top-1 router
    carries, moves     tokens into the rows that experts or other processes get, and answers out of them
    answers, answer    the experts, with equally many rows for each; ``answer_sorted`` with as many as there are

What they compute is what router, exchange and experts compute in plain torch, the random selection of tokens included.
"""

import functools
from typing import TYPE_CHECKING

import torch

from megatron.moe import kernels
from megatron.moe.experts import Experts
from megatron.moe.plan import RoutingPlan
from megatron.moe.router import Router, Routing
from megatron.parallel.tensor_collectives import take_first

if TYPE_CHECKING:
    from megatron.moe.kernels.gate import Gating
    from megatron.moe.kernels.rows import Moves

MOST_EXPERTS = 1024


def routes(router: Router, x: torch.Tensor) -> bool:
    """Whether :func:`route` can take the place of ``router`` for input ``x``."""
    if not (
        router.topk == 1
        and router.num_experts <= MOST_EXPERTS
        and not router.tensor_group.sequence_parallel
        and not (router.training and router.noise_policy is not None)
        and x.numel() > 0
        and kernels.usable(x)
    ):
        return False
    from megatron.moe.kernels.gate import fits

    return fits(x, router.weight)


def route(router: Router, x: torch.Tensor) -> Routing:
    """The routing of tokens [..., H]."""
    from megatron.moe.kernels.gate import gate

    capacity = router.capacity(x.numel() // x.size(-1))
    agree = functools.partial(take_first, group=router.tensor_group) if router.own_logits else None
    _, found = gate(x.flatten(0, -2).contiguous(), router.weight, capacity, random=_random(router), agree=agree)
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


def carries(x: torch.Tensor) -> bool:
    """Whether :func:`moves` can take the place of :class:`megatron.moe.dispatch.IndexMoves` for tokens ``x``."""
    return x.numel() > 0 and kernels.usable(x)


def moves(plan: RoutingPlan, chunk: int | None = None) -> "Moves":
    """Tokens into rows and answers out of them; see :class:`megatron.moe.dispatch.IndexMoves`."""
    from megatron.moe.kernels.rows import Moves, buffer_places, sorted_places

    if plan.capacity is None:
        places = sorted_places(plan.expert_TK, plan.slot_TK, plan.counts_E)
    else:
        places = buffer_places(plan.expert_TK, plan.slot_TK, plan.counts_E.numel(), plan.capacity, chunk)
    return Moves(places, plan.gate_TK)


def permute(x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Row ``index_R[r]`` (int32) of at least one row for each r; ``inverse_R`` is the permutation back."""
    from megatron.moe.kernels.rows import Places, to_rows

    return to_rows(x_RH, Places(inverse_R, index_R))


def answers(experts: Experts, x: torch.Tensor) -> bool:
    """Whether :func:`answer` can take the place of ``experts`` for rows ``x``."""
    return x.numel() > 0 and x.dtype == experts.w1.dtype and kernels.usable(x)


def answer(experts: Experts, x_LGcH: torch.Tensor) -> torch.Tensor:
    """Answers to equally many rows for each expert, [L, G, c, H]; in memory they are [G, L, c, H], ready to travel."""
    from megatron.moe.kernels.experts import answers

    return answers(x_LGcH, experts.weights())


def answers_sorted(experts: Experts, x: torch.Tensor) -> bool:
    """Whether :func:`answer_sorted` can take the place of ``experts.forward_sorted`` for rows ``x``."""
    L, H, F = experts.w1.shape
    return answers(experts, x) and L <= MOST_EXPERTS and kernels.groupable(x, H, F)


def answer_sorted(experts: Experts, x_RH: torch.Tensor, counts_L: torch.Tensor) -> torch.Tensor:
    """Answers [R, H] to rows sorted by expert, of which expert i has ``counts_L[i]``, without waiting for the host."""
    from megatron.moe.kernels.experts import answers_sorted

    return answers_sorted(x_RH, experts.weights(), counts_L.to(x_RH.device, non_blocking=True))


def _random(router: Router) -> bool:
    return router.training and router.random_selection


def _routing(found: "Gating", capacity: int | None) -> Routing:
    expert_TK, gate_TK, slot_TK = (x_T[:, None] for x_T in (found.expert_T.long(), found.gate_T, found.slot_T.long()))
    plan = RoutingPlan(expert_TK, gate_TK, slot_TK, found.counts_E, capacity, found.dropped)
    return Routing(plan, found.aux_loss, found.z_loss)
