"""Random tokens that load the experts of a given router in a wanted way.

Random tokens and a random router are neither balanced nor as unbalanced as training is at its worst, and another draw
gives another load. Here the router stays as it is and the tokens are moved: along the columns of the pseudo-inverse of
its weights, so that a chosen logit changes and the others do not.

Shapes: T tokens, H hidden, E experts, K experts of a token.
"""

import torch
import torch.nn.functional as F

BUSIEST = 2.0  # of the mean load; a router that has learned to spread tokens is between 1 and 2
MARGIN = 0.1  # of the wanted expert's logit before the next; far more than rounding tokens or logits to bf16 takes away
DRAWS = 8  # of T random tokens, over which the busiest expert's load is averaged in the search
STEPS = 30  # of the search


class Loads:
    """Even and skewed tokens for the router ``weight_EH``, which must not change afterwards.

    Tokens are moved in fp32 and rounded afterwards: many moves are smaller than the steps between bf16 numbers.

    Args:
        weight_EH: logits are x @ weight.T.
        tokens: T, for the search below.

    Attributes:
        strength: how strongly tokens prefer some experts in :meth:`skewed`: found by bisection on random tokens, so
            that the busiest expert gets ``BUSIEST`` times the mean. Preferences are normally distributed.

    Raises:
        ValueError: more experts than hidden units, so that logits cannot be chosen.
    """

    def __init__(self, weight_EH: torch.Tensor, tokens: int) -> None:
        E, H = weight_EH.shape
        if E > H:
            raise ValueError(f"{E} experts with hidden size {H}: expected at most as many experts as hidden units")
        self.weight_EH = weight_EH.detach().float()
        self.lift_EH = torch.linalg.pinv(self.weight_EH.double()).T.float()
        places_E = (torch.arange(E, device=weight_EH.device, dtype=torch.float64) + 0.5) / E
        preference_E = torch.special.ndtri(places_E).flip(0).float()
        draws = [torch.randn(tokens, H, device=weight_EH.device) @ self.weight_EH.T for _ in range(DRAWS)]

        def busiest(strength: float) -> float:
            experts = [(logits_TE + strength * preference_E).argmax(-1) for logits_TE in draws]
            most = [int(torch.bincount(expert_T, minlength=E).max()) for expert_T in experts]
            return sum(most) / DRAWS * E / tokens

        low, high = 0.0, 4.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if busiest(middle) < BUSIEST else (low, middle)
        self.strength = high
        self.shift_H = self.strength * preference_E @ self.lift_EH

    def even(self, x_TH: torch.Tensor, topk: int = 1) -> torch.Tensor:
        """``x_TH``, fp32, moved as little as needed for each expert to get T * topk / E of them, but for rounding."""
        T, E = x_TH.size(0), self.weight_EH.size(0)
        first_T = torch.randperm(T, device=x_TH.device) * topk
        wanted_TK = (first_T[:, None] + torch.arange(topk, device=x_TH.device)) % E
        logits_TE = x_TH @ self.weight_EH.T
        best_T = logits_TE.scatter(1, wanted_TK, float("-inf")).amax(-1) if topk < E else logits_TE.amin(-1)
        missing_TK = (best_T[:, None] + MARGIN - logits_TE.gather(1, wanted_TK)).clamp(min=0)
        move_TE = torch.zeros_like(logits_TE).scatter(1, wanted_TK, missing_TK)
        return x_TH + move_TE @ self.lift_EH

    def skewed(self, x_TH: torch.Tensor) -> torch.Tensor:
        """``x_TH``, fp32, moved all alike, so that experts are preferred to each other by :attr:`strength`."""
        return x_TH + self.shift_H

    def counts(self, x_TH: torch.Tensor, topk: int = 1) -> torch.Tensor:
        """Tokens of each expert, [E]."""
        expert_TK = F.linear(x_TH.detach().float(), self.weight_EH).topk(topk, -1).indices
        return torch.bincount(expert_TK.flatten(), minlength=self.weight_EH.size(0))
