"""One stage of a pipeline: some of a GPT's layers under the names that they have in the whole model.

Shapes: B batch, S sequence, H hidden, V vocabulary (padded).
"""

import functools
from collections.abc import Mapping

import torch
from torch import nn

from megatron.config import MoEConfig
from megatron.model.embedding import Embedding
from megatron.model.layer import TransformerLayer
from megatron.model.randomness import seed_generators, seed_layer
from megatron.model.recomputation import run_seeded
from megatron.moe.layer import MoEStats
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_parallel import VocabParallelEmbedding


class OutputTable(nn.Module):
    """The last stage's copy of the token table. It is tied to the first stage's and reads the logits off."""

    def __init__(self, vocab_size: int, hidden_size: int, tensor_group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab_size, hidden_size, tensor_group)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V], of which tensor-parallel processes get V / size each."""
        return self.word_embeddings.logits(x_BSH)


class PipelineStage(nn.Module):
    """The layers of one stage. Parameters have the names of :class:`megatron.model.gpt.GPTModel`'s.

    The first stage has the embedding; the last one the final layer norm and a copy of the token table.

    A stage passes on activations only. The losses of its MoE layers act on the gradient where they arise
    (:func:`add_loss`).

    Args:
        moe: gives the coefficients of the MoE losses.
        embedding: the first stage's.
        layers: by their number in the model.
        final_layernorm: the last stage's.
        output: the last stage's.
        checkpoint_activations: keep only each layer's input for the backward pass and compute the rest again.
    """

    def __init__(
        self,
        moe: MoEConfig,
        embedding: Embedding | None,
        layers: Mapping[int, TransformerLayer],
        final_layernorm: nn.Module | None,
        output: OutputTable | None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.checkpoint_activations = checkpoint_activations
        self.is_first, self.is_last = embedding is not None, output is not None
        self.embedding = embedding if self.is_first else output
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.final_layernorm = final_layernorm

    def forward(
        self,
        x: torch.Tensor,
        seed: int,
        loss_scale: float,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, MoEStats]]:
        """Run one micro-batch through the stage.

        Args:
            x: the stage before's activations [B, S, H]; for the first stage the token ids, int64 [B, S].
            seed: of all that is random in this micro-batch, equal on all stages.
            loss_scale: by what the LM loss is multiplied before the backward pass; the MoE losses are, too.
            position_ids: as of :class:`megatron.model.gpt.GPTModel`, for the first stage.
            cu_seqlens: as of :class:`megatron.model.gpt.GPTModel`, for all stages.

        Returns:
            Activations [B, S, H], of the last stage logits [B, S, V]; and what its MoE layers tell, by layer.
        """
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        if self.is_first:
            if self.training:
                seed_generators(seed)
            x = self.embedding(x, position_ids)
        routed: dict[int, MoEStats] = {}
        for name, layer in self.layers.items():
            if self.training:
                seed_this = functools.partial(seed_layer, seed, int(name))
                x, stats = run_seeded(functools.partial(layer, cu_seqlens=cu_seqlens), x, seed_this, recompute)
            else:
                x, stats = layer(x, cu_seqlens=cu_seqlens)
            if stats is not None:
                routed[int(name)] = stats
                moe_loss = self.moe.moe_loss_coeff * stats.aux_loss + self.moe.moe_z_loss_coeff * stats.z_loss
                x = add_loss(x, moe_loss, loss_scale)
        if self.is_last:
            x = self.embedding(self.final_layernorm(x))
        return x, routed


def add_loss(x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """``x`` unchanged; in the backward pass ``loss`` gets the gradient ``scale``, as if scale * loss were added later.

    So a loss that arises in the middle of a pipeline need not travel to its end.
    """
    return _AddLoss.apply(x, loss, scale)


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None
