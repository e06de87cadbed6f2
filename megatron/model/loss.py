"""Cross-entropy over a large vocabulary, in fp32 without an fp32 copy of all logits.

Letters: B batch, S sequence, T = B * S tokens, V vocabulary.
"""

import torch
from torch.autograd.function import once_differentiable

# Elements of logits that are held in fp32 at a time: 256 MiB.
CHUNK_ELEMENTS = 1 << 26


class _TokenCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each token.

    Keeps only the logits as they came (bf16 in training) and goes through them in chunks of tokens; the backward pass
    computes the softmax again: d loss / d logits = softmax(logits) - onehot(label).
    """

    @staticmethod
    def forward(ctx, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_TV, labels_T)
        rows = max(1, CHUNK_ELEMENTS // logits_TV.size(1))
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        losses = [
            -torch.log_softmax(logits, dim=-1, dtype=wide).gather(1, labels[:, None])[:, 0]
            for logits, labels in zip(logits_TV.split(rows), labels_T.split(rows), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_TV, labels_T = ctx.saved_tensors
        rows = max(1, CHUNK_ELEMENTS // logits_TV.size(1))
        grad_TV = torch.empty_like(logits_TV)
        chunks = zip(logits_TV.split(rows), labels_T.split(rows), grad_T.split(rows), grad_TV.split(rows), strict=True)
        for logits, labels, grad, out in chunks:
            probabilities = torch.softmax(logits, dim=-1, dtype=grad_T.dtype)
            probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((len(labels), 1), -1.0))
            torch.mul(probabilities, grad[:, None], out=out)
        return grad_TV, None


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
