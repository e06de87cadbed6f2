"""Losses of the router.

Letters: T tokens of one micro-batch on this rank, E experts.

Both are means over the tokens of one micro-batch on one process, and a run averages them over its micro-batches. So
they do not depend on how micro-batches are spread over processes, as long as --micro-batch-size stays the same.
"""

import torch


def load_balancing_loss(probability_TE: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of mean(p_e) * f_e, 1 at perfect balance.

    ``f_e`` is expert e's share of the counted assignments, dropped ones included; gradient flows through the
    probabilities alone. Source: GShard (arXiv 2006.16668), section 2.2; Switch Transformer (arXiv 2101.03961), eq. 4.
    """
    share_E = counts_E.to(probability_TE.dtype) / counts_E.sum()
    return probability_TE.size(1) * (probability_TE.mean(0) * share_E).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2; keeps logits small. Source: ST-MoE (arXiv 2202.08906), eq. 5."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()
