"""The router: which experts process a token, with what weight, and who is left out of a full expert.

Shapes: T tokens on this rank, H hidden, E experts, K experts of each token.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import MoEConfig
from megatron.moe.balancing import InputMean, build_balancer
from megatron.moe.operations import PLAIN_TORCH, OperationChoice
from megatron.moe.order import random_order
from megatron.moe.plan import Routing, expert_capacity, slots
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.randomness import own_randomness
from megatron.parallel.tensor_collectives import sum_gradients

JITTER = 1e-2


class Router(nn.Module):
    """Top-k gating as in Switch (top-1), GShard (top-2) and DeepSpeed (top-k).

    Logits are x @ weight^T, and gates their softmax, in fp32 (float64 for float64 input) whatever the weight's format.
    With ``moe_router_center_input``, logits are (x - mean) @ weight^T; see :class:`megatron.moe.balancing.InputMean`.
    A token goes to its K highest logits. Its gate is the softmax probability itself for top-1; for K > 1 the
    probabilities of the choices that were kept, divided by their sum.

    An expert takes ``capacity`` tokens. When more choose it:

    * top-1 and top-2: it keeps first choices before second ones; among equals a uniformly random set in training with
      ``moe_rts`` (random token selection), otherwise the first tokens.
    * K > 2: it keeps the tokens with the highest gates.

    Noise, in training only: ``Jitter`` multiplies the router's input by U(1 - 0.01, 1 + 0.01). ``RSample`` adds
    Gumbel noise to the logits for the choice, which draws K experts from the softmax without replacement; gates, aux
    loss and z-loss use the logits without it.

    The load-balancing loss counts all choices, except that for top-2 it counts the first ones only (GShard). Other ways
    to balance the experts are in :mod:`megatron.moe.balancing`; where there are biases, a token goes to the K highest
    sums of logit and bias.

    Capacity, random selection and both losses are defined over the tokens of one micro-batch, which are those that this
    rank passes in. They do not depend on how many ranks share the experts or the batch: for a given micro-batch size
    every layout computes the same. Tensor-parallel processes all route the whole micro-batch. With sequence parallelism
    each computes the logits of its own tokens, and these are gathered, so all go on from the same bits. Without it each
    computes all logits, and the choices that count are the first process's: logits that differ in their last bits, as
    after a sum in another order, would send a token to one expert here and to another there.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        moe: MoEConfig,
        tensor_group: TensorGroup = ALONE,
        operations: Mapping[bool, OperationChoice] = PLAIN_TORCH,
    ) -> None:
        super().__init__()
        if not 1 <= moe.topk <= num_experts:
            raise ValueError(f"--topk {moe.topk} of {num_experts} experts; give a number from 1 to {num_experts}")
        if moe.moe_noise_policy not in (None, "Jitter", "RSample"):
            raise ValueError(f"unknown noise policy {moe.moe_noise_policy!r}; give Jitter, RSample or None")
        self.num_experts = num_experts
        self.tensor_group = tensor_group
        self.topk = moe.topk
        self.noise_policy = moe.moe_noise_policy
        self.random_selection = moe.moe_rts
        self.min_capacity = moe.moe_min_capacity
        self.train_factor = moe.moe_train_capacity_factor if moe.moe_token_dropping else None
        self.eval_factor = moe.moe_eval_capacity_factor
        self.operations = operations  # in training, and in evaluation
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.balancer = build_balancer(num_experts, moe)
        self.centering = InputMean(hidden_size) if moe.moe_router_center_input else None

    @property
    def own_logits(self) -> bool:
        """Whether tensor-parallel processes compute all logits, each by itself, and could choose differently."""
        return self.tensor_group.size > 1 and not self.tensor_group.sequence_parallel

    def forward(self, x: torch.Tensor) -> Routing:
        """Route the tokens of one micro-batch, [..., H]; with sequence parallelism this rank's, [..., S, H]."""
        return self.operations[self.training].of("route", x, self.weight).route(self, x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[..., E] in fp32 or wider, for [..., H]."""
        precise = torch.promote_types(x.dtype, torch.float32)
        if self.centering is not None and self.training:
            self.centering.observe(x)
        x = x.to(precise) if self.centering is None else x.to(precise) - self.centering.input_mean
        own, weight = ALONE, self.weight
        if self.tensor_group.sequence_parallel:
            own, weight = self.tensor_group, sum_gradients(self.tensor_group, weight)[0]
        if self.training and self.noise_policy == "Jitter":
            with own_randomness(own, x.device):
                x = x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)
        return F.linear(x, weight.to(precise))

    def choose(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The experts of each token, int64 [T, K], best first; among equal scores the lowest expert number.

        Scores are logits with biases and noise. In training the balancer, if there is one, takes them in.
        """
        if self.balancer is not None and self.balancer.bias_E is not None:
            logits_TE = logits_TE + self.balancer.bias_E
        if self.training and self.noise_policy == "RSample":
            logits_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()  # -log(Exp(1)) is Gumbel(0, 1)
        choices, scores_TE = [], logits_TE
        for _ in range(self.topk):  # unlike torch.topk, argmax says which of equals it takes
            choices.append(logits_TE.argmax(-1, keepdim=True))
            logits_TE = logits_TE.scatter(1, choices[-1], -torch.inf)
        expert_TK = torch.cat(choices, dim=1)
        if self.balancer is not None and self.training:
            self.balancer.observe(scores_TE, expert_TK)
        return expert_TK

    def capacity(self, num_tokens: int) -> int | None:
        """Rows of each expert's buffer for ``num_tokens`` tokens on this rank; None where nothing is dropped."""
        factor = self.train_factor if self.training else self.eval_factor
        if factor is None:
            return None
        return expert_capacity(num_tokens, self.num_experts, self.topk, factor, self.min_capacity)

    def assign_slots(
        self, expert_TK: torch.Tensor, gate_TK: torch.Tensor, counts_E: torch.Tensor, capacity: int | None
    ) -> torch.Tensor:
        """The slot of each assignment, int64 [T, K]: those that an over-full expert keeps get the first ones."""
        T, K = expert_TK.shape
        priority_KT = None  # choice by choice, first tokens first
        if capacity is not None and K > 2:
            priority_KT = -gate_TK.T
        elif capacity is not None and self.training and self.random_selection and K == 1 and T > 0:
            order_T = random_order(T, torch.randint(2**62, (), device=expert_TK.device))
            priority_KT = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(T, device=order_T.device))
        elif capacity is not None and self.training and self.random_selection:
            token_T = torch.rand(T, dtype=torch.float64, device=expert_TK.device)  # 53 random bits: no ties
            priority_KT = token_T + torch.arange(K, device=expert_TK.device)[:, None]
        priority_N = None if priority_KT is None else priority_KT.flatten()
        return slots(expert_TK.T.flatten(), counts_E, priority_N).view(K, T).T
