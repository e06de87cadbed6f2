"""Losses that keep a router healthy. Both are unscaled: :meth:`megatron.model.gpt.GPTModel.moe_loss` scales them.

Shapes: T tokens on this rank, E experts, K choices of each token that count.
"""

import torch

from megatron.moe.plan import count_experts


def load_balancing_loss(
    gate_TE: torch.Tensor, expert_TK: torch.Tensor, share_E: torch.Tensor | None = None
) -> torch.Tensor:
    """E * sum over experts of (mean gate) * (share of assignments): 1 when both are even, up to E when one takes all.

    The Switch and GShard form (Fedus et al. 2021, eq. 4; Lepikhin et al. 2020, algorithm 1). Gradients flow through the
    mean gate only; the share counts assignments before any is dropped. Both are over the tokens of one micro-batch on
    one rank, unless shares are given, such as those of a global batch (Qiu et al. 2025, arXiv 2501.11873).

    Args:
        gate_TE: probabilities without noise.
        expert_TK: int64, the chosen experts.
        share_E: fp32, each expert's share of the assignments; by default that of ``expert_TK``.

    Returns:
        A scalar in the number format of ``gate_TE``; 0 without tokens.
    """
    T, E = gate_TE.shape
    if share_E is None:
        share_E = count_experts(expert_TK, E).to(gate_TE.dtype) / max(expert_TK.numel(), 1)
    return E * torch.sum(gate_TE.sum(0) / max(T, 1) * share_E)


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean over tokens of logsumexp(logits)^2, which keeps logits small (Zoph et al. 2022, eq. 5); 0 without tokens."""
    return logits_TE.logsumexp(-1).square().sum() / max(logits_TE.size(0), 1)
