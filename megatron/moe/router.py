"""The router: which experts process a token, and how much each counts.

Letters: T tokens on this rank, H hidden, E experts, K experts a token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import MoEConfig
from megatron.moe.losses import load_balancing_loss, z_loss
from megatron.moe.plan import RoutingPlan, assign_slots, count_assignments, expert_capacity

JITTER = 0.01


class Router(nn.Module):
    """Scores tokens against experts with one matrix, picks the best, and places them in the experts' buffers.

    Scores, probabilities and gates are fp32 (or wider) whatever the model's number format is.

    What over-full experts keep is decided as in DeepSpeed: with one expert a token, a uniformly random choice (random
    token selection) or the first tokens; with two, first choices before second choices, and among each the same; with
    more, the highest probabilities.
    """

    def __init__(self, hidden_size: int, num_experts: int, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts, self.moe = num_experts, moe
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TH: torch.Tensor) -> tuple[RoutingPlan, torch.Tensor, torch.Tensor]:
        """Returns the plan, the load-balancing loss and the z-loss (unscaled scalars)."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        scored_TH = x_TH.to(wide)
        if self.training and self.moe.moe_noise_policy == "Jitter":
            scored_TH = scored_TH * torch.empty_like(scored_TH).uniform_(1 - JITTER, 1 + JITTER)
        logits_TE = F.linear(scored_TH, self.weight.to(wide))
        probability_TE = logits_TE.softmax(dim=-1)

        expert_TK = self._choose(logits_TE.detach())
        counts_E = count_assignments(expert_TK, self.num_experts)
        capacity = self._capacity(len(x_TH))
        chosen_TK = probability_TE.gather(1, expert_TK)
        slot_TK = assign_slots(expert_TK, counts_E, self._order(chosen_TK.detach()))
        plan = RoutingPlan(expert_TK, self._gates(chosen_TK, slot_TK, capacity), slot_TK, counts_E, capacity)

        # with two experts a token only the first choice is balanced (GShard)
        counted_E = count_assignments(expert_TK[:, :1], self.num_experts) if self.moe.topk == 2 else counts_E
        return plan, load_balancing_loss(probability_TE, counted_E), z_loss(logits_TE)

    def _choose(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The experts of each token, best first. RSample draws the only expert, or all but the first, at random.

        Adding Gumbel noise to logits and taking the largest draws from softmax(logits) (without replacement).
        """
        K = self.moe.topk
        if not (self.training and self.moe.moe_noise_policy == "RSample"):
            return logits_TE.topk(K, dim=-1).indices
        noised_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
        if K == 1:
            return noised_TE.argmax(dim=-1, keepdim=True)
        first_T1 = logits_TE.argmax(dim=-1, keepdim=True)
        others_TK = noised_TE.scatter(1, first_T1, float("-inf")).topk(K - 1, dim=-1).indices
        return torch.cat([first_T1, others_TK], dim=-1)

    def _capacity(self, tokens: int) -> int | None:
        factor = self.moe.moe_eval_capacity_factor
        if self.training:
            factor = self.moe.moe_train_capacity_factor if self.moe.moe_token_dropping else None
        if factor is None:
            return None
        return expert_capacity(tokens, self.num_experts, self.moe.topk, factor, self.moe.moe_min_capacity)

    def _order(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Assignments (number t * K + k) in the order in which they take slots."""
        T, K = chosen_TK.shape
        if K > 2:
            return chosen_TK.flatten().argsort(descending=True, stable=True)
        token_T = torch.arange(T, device=chosen_TK.device)
        if self.training and self.moe.moe_rts:
            token_T = torch.randperm(T, device=chosen_TK.device)
        return torch.cat([token_T * K + k for k in range(K)])

    def _gates(self, chosen_TK: torch.Tensor, slot_TK: torch.Tensor, capacity: int | None) -> torch.Tensor:
        """The probability of the only expert; of several, their shares of what was kept."""
        gate_TK = chosen_TK if capacity is None else chosen_TK * (slot_TK < capacity)
        if self.moe.topk == 1:
            return gate_TK
        return gate_TK / gate_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gate_TK.dtype).eps)
