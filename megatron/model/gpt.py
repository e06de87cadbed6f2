"""GPT as published: learned positions, pre-LayerNorm, GELU, biases, tied embeddings; dense or with experts.

Shapes: B batch, S sequence, H hidden, V vocabulary (padded), E experts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.model.attention import KeyValueCache
from megatron.model.embedding import Embedding
from megatron.model.initialization import initialize
from megatron.model.layer import TransformerLayer
from megatron.model.loss import cross_entropy
from megatron.model.randomness import seed_layer
from megatron.model.recomputation import run_seeded
from megatron.moe.layer import MoEStats
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup
from megatron.parallel.tensor_collectives import gather
from megatron.parallel.tensor_parallel import LayerNorm


class ModelLoss(NamedTuple):
    """Losses of one micro-batch; none is scaled by a coefficient."""

    lm_loss: torch.Tensor  # fp32 scalar, mean over unmasked tokens
    aux_loss: torch.Tensor  # fp32 scalar, load balancing, summed over MoE layers
    z_loss: torch.Tensor  # fp32 scalar, router z-loss, summed over MoE layers
    counts: list[torch.Tensor]  # one int64 [E] for each MoE layer: tokens routed to each expert, before dropping
    dropped: torch.Tensor  # int64 [MoE layers]: assignments that found no room


class GPTModel(nn.Module):
    """A GPT over token ids.

    Args:
        model: its shape.
        moe: which feed-forward layers are experts, and how tokens get there.
        vocab_size: rows of the token table, padding included.
        expert_group: the processes that share an MoE layer's experts, by its place among these layers; alone by
            default.
        tensor_group: the processes that share every layer's matrices; alone by default.
        seed: initial values depend on this and on each parameter's name only.
        checkpoint_activations: keep only each layer's input for the backward pass and compute the rest again.

    In training, torch's generator is seeded anew before each layer, from the seed last given to it and the layer's
    number (:func:`megatron.model.randomness.seed_layer`); the embedding's dropout draws from it as it stands. The
    attribute ``seed_layer`` does that. While a CUDA graph is recorded, in which nothing can be seeded, it is another
    function.

    On ``torch.device("meta")`` it has shapes but no memory, for counting.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        vocab_size: int,
        expert_group: Callable[[int], ExpertGroup] | None = None,
        tensor_group: TensorGroup = ALONE,
        *,
        seed: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        alone = ExpertGroup(size=1, rank=0, group=None)
        self.config = model
        self.vocab_size = vocab_size
        self.tensor_group = tensor_group
        self.checkpoint_activations = checkpoint_activations
        self.seed_layer: Callable[[int, int], None] = seed_layer
        self.embedding = Embedding(
            vocab_size, model.position_rows, model.hidden_size, model.hidden_dropout, tensor_group
        )
        self.layers = nn.ModuleList()
        for layer in range(model.num_layers):
            has_experts = moe.experts_of_layer(layer) > 1
            group = expert_group(moe.place(layer)) if expert_group and has_experts else alone
            self.layers.append(TransformerLayer(model, moe, layer, group, seed, tensor_group))
        self.final_layernorm = LayerNorm(model.hidden_size, model.layernorm_epsilon, tensor_group)
        initialize(self, model.init_method_std, model.num_layers, seed)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
        loss_mask_BS: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor | ModelLoss:
        """Logits of the next token after each one, or the losses when there are labels.

        Args:
            tokens_BS: int64 ids below the padded vocabulary size.
            labels_BS: int64, the token that follows each one.
            loss_mask_BS: 1 where a token counts, 0 where not; all count by default.
            cache: earlier keys and values of the same sequences; ``tokens_BS`` go on where it ends, and are added.
            position_ids: int64 rows of the position table; 0, 1, 2 ... by default.
            cu_seqlens: int32 [documents + 1], where the documents of the sequences, laid end to end, begin and end;
                a token then attends to its own document only. By default each sequence is one.

        Returns:
            ModelLoss with labels, otherwise logits [B, S, V] in the model's number format.

        Raises:
            ValueError: the sequence is longer than the position table, the shapes do not fit together, or there are
                both a cache and positions or documents.
        """
        x_BSH, routed = self.hidden_states(tokens_BS, cache, position_ids, cu_seqlens)
        logits_BSV = self.head(x_BSH)
        if labels_BS is None:
            return gather(logits_BSV, self.tensor_group, dim=-1)
        zero = x_BSH.new_zeros((), dtype=torch.float32)
        return ModelLoss(
            lm_loss=cross_entropy(logits_BSV, labels_BS, loss_mask_BS, self.tensor_group),
            aux_loss=sum((layer.aux_loss for layer in routed), start=zero),
            z_loss=sum((layer.z_loss for layer in routed), start=zero),
            counts=[layer.counts_E for layer in routed],
            dropped=torch.stack([layer.dropped for layer in routed])
            if routed
            else zero.new_zeros(0, dtype=torch.int64),
        )

    def hidden_states(
        self,
        tokens_BS: torch.Tensor,
        cache: KeyValueCache | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[MoEStats]]:
        """What the head reads, [B, S, H] after the last layer norm, and what each MoE layer tells.

        With sequence parallelism it is this process's piece of the sequence.
        """
        if cache is not None:
            if position_ids is not None or cu_seqlens is not None:
                raise ValueError(
                    "a key-value cache goes with neither position_ids nor cu_seqlens; give one or the other"
                )
            position_ids = cache.begin(tokens_BS.size(1))
        x_BSH = self.embedding(tokens_BS, position_ids)
        recompute = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        routed: list[MoEStats] = []
        seed = torch.initial_seed()
        for number, layer in enumerate(self.layers):
            if self.training:
                seed_this = functools.partial(self.seed_layer, seed, number)
                x_BSH, stats = run_seeded(
                    functools.partial(layer, cache=cache, cu_seqlens=cu_seqlens), x_BSH, seed_this, recompute
                )
            else:
                x_BSH, stats = layer(x_BSH, cache, cu_seqlens)
            if stats is not None:
                routed.append(stats)
        return self.final_layernorm(x_BSH), routed

    def head(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]: the product with the token table. Tensor-parallel processes get V / size of them each."""
        return self.embedding.word_embeddings.logits(x_BSH)
