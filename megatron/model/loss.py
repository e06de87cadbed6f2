"""The losses of a model: cross-entropy over a large vocabulary, in fp32 without an fp32 copy of all logits; and sums.

Shapes: B batch, S sequence, T = B * S tokens, V vocabulary; with tensor parallelism the columns of this process;
E experts.
"""

import dataclasses
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron.moe.kernels import usable
from megatron.moe.layer import MoEStats
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.vocabulary import check_ids

# Elements of logits that are held in fp32 at a time: 256 MiB.
CHUNK_ELEMENTS = 1 << 26


@dataclasses.dataclass
class LossSums:
    """Losses and routing of micro-batches, summed over them; on the device and without gradients.

    No loss is scaled by its coefficient. Nothing is fetched from the device until someone reads it.
    """

    losses: torch.Tensor  # fp32 [4]: LM loss, aux loss and z-loss, each summed over MoE layers; number of micro-batches
    counts: list[torch.Tensor]  # one int64 [E] for each MoE layer: tokens routed to each expert, before dropping
    dropped: torch.Tensor  # int64 [MoE layers]: dropped assignments

    @classmethod
    def of(
        cls, lm_loss: torch.Tensor, aux_loss: torch.Tensor, z_loss: torch.Tensor, layers: Collection[MoEStats]
    ) -> "LossSums":
        """Those of one micro-batch, whose MoE layers are ``layers``, with losses as of :func:`sum_moe_losses`."""
        zero = torch.zeros_like(lm_loss)
        return cls(
            torch.stack([lm_loss, zero + aux_loss, zero + z_loss, torch.ones_like(lm_loss)]).detach(),
            [layer.counts_E for layer in layers],
            torch.stack([layer.dropped for layer in layers]) if layers else zero.new_zeros(0, dtype=torch.int64),
        )

    def __add__(self, other: "LossSums") -> "LossSums":
        """Sums over the micro-batches of both."""
        return LossSums(
            self.losses + other.losses,
            [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)],
            self.dropped + other.dropped,
        )


def sum_moe_losses(layers: Iterable[MoEStats]) -> tuple[torch.Tensor, torch.Tensor]:
    """The aux loss and the z-loss, each summed over MoE layers; without any, zeros on the CPU."""
    aux_loss = z_loss = torch.zeros(())
    for layer in layers:
        aux_loss, z_loss = aux_loss + layer.aux_loss, z_loss + layer.z_loss
    return aux_loss, z_loss


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


class _SharedTokenCrossEntropy(torch.autograd.Function):
    """The same where each process of a group has a range of the vocabulary.

    -log p(label) = log sum exp(x - m) - (x_label - m), with m the largest logit of all processes. Two reductions of
    fp32 numbers, of one and of two a token; nothing of the vocabulary's size is exchanged.
    """

    @staticmethod
    def forward(ctx, logits_TV: torch.Tensor, labels_T: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        V = logits_TV.size(1)
        rows = max(1, CHUNK_ELEMENTS // V)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        largest_T = logits_TV.amax(1).to(wide)
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group.group)
        local_T = labels_T - group.rank * V
        here_T = (local_T >= 0) & (local_T < V)
        local_T = local_T.masked_fill(~here_T, 0)
        sums = [
            (logits.to(wide) - largest[:, None]).exp_().sum(1)
            for logits, largest in zip(logits_TV.split(rows), largest_T.split(rows), strict=True)
        ]
        label_T = logits_TV.gather(1, local_T[:, None])[:, 0].to(wide) - largest_T
        both_2T = torch.stack([torch.cat(sums), torch.where(here_T, label_T, 0.0)])
        dist.all_reduce(both_2T, group=group.group)
        log_sum_T = both_2T[0].log()
        loss_T = log_sum_T - both_2T[1]
        ctx.save_for_backward(logits_TV, local_T, here_T, largest_T, log_sum_T, loss_T)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_TV, local_T, here_T, largest_T, log_sum_T, loss_T = ctx.saved_tensors
        rows = max(1, CHUNK_ELEMENTS // logits_TV.size(1))
        grad_TV = torch.empty_like(logits_TV)
        pieces = (x.split(rows) for x in (logits_TV, grad_TV, largest_T, log_sum_T, grad_T))
        for logits, grad, largest, log_sum, outer in zip(*pieces, strict=True):
            softmax = ((logits.to(largest.dtype) - largest[:, None]) - log_sum[:, None]).exp_()
            grad.copy_(softmax.mul_(outer[:, None]))
        at_label_T = (torch.expm1(-loss_T) * grad_T).to(grad_TV.dtype)
        other_T = grad_TV.gather(1, local_T[:, None])[:, 0]
        return grad_TV.scatter_(1, local_T[:, None], torch.where(here_T, at_label_T, other_T)[:, None]), None, None


def cross_entropy(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    loss_mask_BS: torch.Tensor | None = None,
    tensor_group: TensorGroup = ALONE,
) -> torch.Tensor:
    """Mean of -log p(label) over the tokens that ``loss_mask_BS`` weighs with 1; an fp32 scalar (fp64 for fp64 logits).

    Args:
        logits_BSV: in any float format. On a GPU the backward pass writes their gradient over them.
        labels_BS: int64 below the size of the whole vocabulary, also where the mask is 0.
        loss_mask_BS: weights of the tokens; all 1 by default. All 0 gives a loss of 0.
        tensor_group: the processes that hold one range of the vocabulary each; all get the loss.

    Raises:
        ValueError: the shapes of logits, labels and mask do not fit together.
        IndexError: a label outside of the vocabulary; on GPUs see :func:`megatron.parallel.vocabulary.check_ids`.
    """
    mask_BS = torch.ones_like(labels_BS) if loss_mask_BS is None else loss_mask_BS
    if not logits_BSV.shape[:-1] == labels_BS.shape == mask_BS.shape:
        raise ValueError(
            f"logits {tuple(logits_BSV.shape)}, labels {tuple(labels_BS.shape)} and loss mask {tuple(mask_BS.shape)} "
            "do not belong together; expected [B, S, V], [B, S] and [B, S]"
        )
    check_ids(labels_BS, logits_BSV.size(-1) * tensor_group.size)
    logits_TV, labels_T = logits_BSV.flatten(0, -2), labels_BS.flatten()
    if tensor_group.size == 1 and usable(logits_TV):
        from megatron.model.kernels.cross_entropy import cross_entropy as fused

        loss_T = fused(logits_TV.contiguous(), labels_T)
    elif tensor_group.size == 1:
        loss_T = _TokenCrossEntropy.apply(logits_TV, labels_T)
    else:
        loss_T = _SharedTokenCrossEntropy.apply(logits_TV, labels_T, tensor_group)
    mask_T = mask_BS.flatten().to(loss_T.dtype)
    total = mask_T.sum()
    return (loss_T * mask_T).sum() / torch.where(total > 0, total, 1.0)
