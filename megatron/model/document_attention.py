"""Causal attention in which a token attends only to tokens of its own document.

Shapes: B batch, S sequence, N heads (of this process), D head size.
"""

import torch
import torch.nn.functional as F

_FLASH_FORMATS = (torch.bfloat16, torch.float16)


def document_attention(
    q_BNSD: torch.Tensor, k_BNSD: torch.Tensor, v_BNSD: torch.Tensor, cu_seqlens: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V over the tokens of the same document up to each one's own; [B, N, S, D].

    In bf16 and fp16 on a GPU by torch's variable-length flash attention, which does no work between documents;
    elsewhere with a mask [B, 1, S, S].

    Args:
        q_BNSD, k_BNSD, v_BNSD: queries, keys and values.
        cu_seqlens: where documents begin and end in the B * S tokens, int32 [documents + 1]; see
            :func:`megatron.data.documents.cumulative_lengths`.
        dropout: probability, on attention probabilities.

    Raises:
        ValueError: there is dropout, which variable-length attention does not have.
    """
    B, _, S, _ = q_BNSD.shape
    if not _flash_supports(q_BNSD):
        mask = document_mask(cu_seqlens, B, S)
        return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, attn_mask=mask, dropout_p=dropout)
    if dropout:
        raise ValueError(
            f"attention dropout {dropout:g} with --reset-attention-mask: torch's variable-length attention has none; "
            "use --attention-dropout 0"
        )
    from torch.nn.attention.varlen import varlen_attn  # not above: it takes a second to import

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNSD, k_BNSD, v_BNSD))  # (B * S, N, D), mostly views
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, S, S, window_size=(-1, 0))  # causal
    assert isinstance(y, torch.Tensor)  # a pair only if asked for more
    return y.unflatten(0, (B, S)).transpose(1, 2)


def document_mask(cu_seqlens: torch.Tensor, B: int, S: int) -> torch.Tensor:
    """True where a token (row) may attend to another one (column): bool [B, 1, S, S]."""
    document_BS = document_numbers(cu_seqlens, B * S).view(B, S)
    return (document_BS[:, None, :, None] == document_BS[:, None, None, :]).tril()


def document_numbers(cu_seqlens: torch.Tensor, count: int) -> torch.Tensor:
    """The document, counted from 0, of each of the first ``count`` tokens of a micro-batch: int64 [count]."""
    place = torch.arange(count, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(place, cu_seqlens[1:], right=True)


def _flash_supports(q_BNSD: torch.Tensor) -> bool:
    D = q_BNSD.size(-1)
    return q_BNSD.is_cuda and q_BNSD.dtype in _FLASH_FORMATS and D % 8 == 0 and D <= 256
