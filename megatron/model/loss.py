"""Cross-entropy over a large vocabulary, in fp32 without an fp32 copy of all logits.

Letters: B batch, S sequence, T = B * S tokens, V vocabulary.
"""

import torch
from torch.autograd.function import once_differentiable

# Elements of logits that are held in fp32 at a time: 256 MiB.
CHUNK_ELEMENTS = 1 << 26


class _TokenCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each token.

    Keeps the logits as they came (bf16 in training); d loss / d logits = softmax(logits) - onehot(label) is computed
    from them in the same format, where softmax itself works in fp32. Only the label's element, in which the difference
    would cancel, comes from the loss: p - 1 = expm1(-loss).
    """

    @staticmethod
    def forward(ctx, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_ELEMENTS // logits_TV.size(1))
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        losses = [
            -torch.log_softmax(logits, dim=-1, dtype=wide).gather(1, labels[:, None])[:, 0]
            for logits, labels in zip(logits_TV.split(rows), labels_T.split(rows), strict=True)
        ]
        loss_T = torch.cat(losses)
        ctx.save_for_backward(logits_TV, labels_T, loss_T)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_TV, labels_T, loss_T = ctx.saved_tensors
        grad_TV = torch.softmax(logits_TV, dim=-1)
        grad_TV *= grad_T[:, None]
        at_label_T = torch.expm1(-loss_T) * grad_T
        return grad_TV.scatter_(1, labels_T[:, None], at_label_T[:, None].to(grad_TV.dtype)), None


def cross_entropy(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of -log p(label) over the tokens that ``loss_mask_BS`` weighs with 1; an fp32 scalar (fp64 for fp64 logits).

    Args:
        logits_BSV: in any float format.
        labels_BS: int64, from 0 to V - 1, also where the mask is 0.
        loss_mask_BS: weights of the tokens; all 1 by default. All 0 gives a loss of 0.

    Raises:
        ValueError: the shapes of logits, labels and mask do not fit together.
    """
    mask_BS = torch.ones_like(labels_BS) if loss_mask_BS is None else loss_mask_BS
    if not logits_BSV.shape[:-1] == labels_BS.shape == mask_BS.shape:
        raise ValueError(
            f"logits {tuple(logits_BSV.shape)}, labels {tuple(labels_BS.shape)} and loss mask {tuple(mask_BS.shape)} "
            "do not belong together; expected [B, S, V], [B, S] and [B, S]"
        )
    loss_T = _TokenCrossEntropy.apply(logits_BSV.flatten(0, -2), labels_BS.flatten())
    mask_T = mask_BS.flatten().to(loss_T.dtype)
    total = mask_T.sum()
    return (loss_T * mask_T).sum() / torch.where(total > 0, total, 1.0)
