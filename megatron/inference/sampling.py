"""From logits to the next token: temperature, top-k, top-p, and a draw that is the same on every device.

Shapes: B batch, V vocabulary.
"""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy: the likeliest token."""

    temperature: float = 1.0
    top_k: int = 0  # only the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # only the fewest likeliest tokens that hold this probability together; 1 keeps all

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a number from 0 (greedy) upwards")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}; expected a number of tokens, or 0 to keep all")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top-p is {self.top_p}; expected a probability above 0 and up to 1 (keeps all)")

    @property
    def greedy(self) -> bool:
        """Whether chance has no part."""
        return self.temperature == 0.0


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """-inf for all but the ``k`` largest logits of each row; equals of the k-th stay (Fan et al. 2018)."""
    if k == 0 or k >= logits_BV.size(-1):
        return logits_BV
    kth_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """-inf for all but the fewest likeliest tokens whose probabilities sum to ``p`` (Holtzman et al. 2020).

    The likeliest token always stays.
    """
    if p >= 1.0:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # held by the likelier ones
    drop_BV = (before_BV >= p).scatter(1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(drop_BV, -math.inf)


def probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution [B, V] that a token is drawn from, fp32: temperature, then top-k, then top-p.

    Greedy puts all on the first of the largest logits.
    """
    logits_BV = logits_BV.float()
    if sampling.greedy:
        return torch.zeros_like(logits_BV).scatter(1, logits_BV.argmax(dim=-1, keepdim=True), 1.0)
    return keep_top_p(keep_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p).softmax(dim=-1)


def next_tokens(logits_BV: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """Choose a token of each row; int64 [B].

    The draw inverts the cumulative distribution: the first token at which it exceeds ``uniform_B``, which holds numbers
    from [0, 1). So a row's token depends on its own logits and its own number only.
    """
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    cumulative_BV = probabilities(logits_BV, sampling).double().cumsum(dim=-1)
    threshold_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
