"""GPT as published: learned positions, pre-LayerNorm, GELU, biases, tied embeddings; dense or with experts.

Shapes: B batch, S sequence, H hidden, V vocabulary (padded), E experts.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.model.attention import KeyValueCache
from megatron.model.embedding import Embedding
from megatron.model.initialization import initialize
from megatron.model.layer import TransformerLayer
from megatron.model.loss import LossSums, cross_entropy, sum_moe_losses
from megatron.model.norm import build_norm
from megatron.model.randomness import run_seeded, seed_layer
from megatron.moe.layer import MoEStats
from megatron.parallel.groups import ALONE, LOCAL_EXPERTS, ExpertGroup, TensorGroup
from megatron.parallel.tensor_collectives import gather


class GPTModel(nn.Module):
    """A GPT over token ids, or a pipeline stage of one.

    A stage has some of the layers; the first one has the embedding, the last one the final norm and the head. Its
    parameters have the names, and so the initial values, that they have in the whole model. The head is the token
    table: a last stage has a second one, whose gradient is to be added to the first one's.

    Args:
        model: its shape.
        moe: which feed-forward layers are experts, how tokens get there, and the coefficients of MoE losses.
        vocab_size: rows of the token table, padding included.
        expert_group: the processes that share an MoE layer's experts, by its index among these layers; alone by
            default.
        tensor_group: the processes that share every layer's matrices; alone by default.
        layers: numbers of the layers that it has, from 0; all by default.
        with_embedding: whether it begins with the embedding.
        with_head: whether it ends with the final norm and the head.
        seed: initial values depend on this and on each parameter's name only.
        checkpoint_activations: keep only each layer's input for the backward pass and compute the rest again.

    In training, torch's generator is seeded anew before each layer, from the seed last given to it and the layer's
    number (:func:`megatron.model.randomness.seed_layer`); the embedding's dropout draws from it as it is. The
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
        layers: Iterable[int] | None = None,
        with_embedding: bool = True,
        with_head: bool = True,
        seed: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.moe = model, moe
        self.vocab_size = vocab_size
        self.tensor_group = tensor_group
        self.with_embedding, self.with_head = with_embedding, with_head
        self.checkpoint_activations = checkpoint_activations
        self.seed_layer: Callable[[int, int], None] = seed_layer
        if with_embedding or with_head:
            self.embedding = Embedding(model, vocab_size, tensor_group, only_table=not with_embedding)
        self.layers = nn.ModuleDict()  # by number
        for layer in range(model.num_layers) if layers is None else layers:
            group = LOCAL_EXPERTS
            if expert_group is not None and moe.experts_of_layer(layer) > 1:
                group = expert_group(moe.moe_layer_index(layer))
            self.layers[str(layer)] = TransformerLayer(model, moe, layer, group, seed, tensor_group)
        if with_head:
            self.final_layernorm = build_norm(model, tensor_group)
        initialize(self, model.init_method_std, model.num_layers, seed)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        cache: KeyValueCache | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token after each one, [B, S, V] in the model's number format, by a whole model.

        Args:
            tokens_BS: int64 ids below the padded vocabulary size.
            cache: as of :meth:`hidden_states`.
            position_ids: as of :meth:`hidden_states`.
            cu_seqlens: as of :meth:`hidden_states`.
        """
        x_BSH, _ = self.hidden_states(tokens_BS, cache, position_ids, cu_seqlens)
        return gather(self.head(x_BSH), self.tensor_group, dim=-1)

    def loss(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        loss_mask_BS: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LossSums]:
        """The loss to train a whole model on, a scalar in fp32 with the MoE losses in it, and what it consists of.

        Args:
            tokens_BS: int64 ids below the padded vocabulary size.
            labels_BS: int64, the token that follows each one.
            loss_mask_BS: 1 where a token counts, 0 where not; all count by default.
            position_ids: as of :meth:`hidden_states`.
            cu_seqlens: as of :meth:`hidden_states`.
        """
        x_BSH, stats = self.hidden_states(tokens_BS, position_ids=position_ids, cu_seqlens=cu_seqlens)
        lm_loss = cross_entropy(self.head(x_BSH), labels_BS, loss_mask_BS, self.tensor_group)
        aux_loss, z_loss = sum_moe_losses(stats.values())
        return lm_loss + self.moe_loss(aux_loss, z_loss), LossSums.of(lm_loss, aux_loss, z_loss, stats.values())

    def hidden_states(
        self,
        x: torch.Tensor,
        cache: KeyValueCache | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, MoEStats]]:
        """What the head or the next stage reads, [B, S, H], and losses and counts of MoE layers by layer.

        With sequence parallelism the activations are this process's piece of the sequence.

        Args:
            x: token ids, int64 [B, S]; for a stage without the embedding what the stage before gave.
            cache: earlier keys and values of the same sequences; ``x`` goes on where it ends, and is added.
            position_ids: int64 rows of the position table; 0, 1, 2 ... by default.
            cu_seqlens: int32 [documents + 1], where the documents of the sequences, laid end to end, begin and end;
                a token then attends to its own document only. By default each sequence is one.

        Raises:
            ValueError: the sequence is longer than the position table, or there are both a cache and positions or
                documents.
        """
        if cache is not None:
            if position_ids is not None or cu_seqlens is not None:
                raise ValueError(
                    "a key-value cache goes with neither position_ids nor cu_seqlens; give one or the other"
                )
            position_ids = cache.begin(x.size(1))
        if self.with_embedding:
            x = self.embedding(x, position_ids)
        recompute = self.checkpoint_activations and self.training and cache is None and torch.is_grad_enabled()
        seed, stats = torch.initial_seed(), {}
        for name, layer in self.layers.items():
            run = functools.partial(layer, cache=cache, cu_seqlens=cu_seqlens)
            seed_this = functools.partial(self.seed_layer, seed, int(name)) if self.training else None
            x, of_layer = run_seeded(run, x, seed_this, recompute)
            if of_layer is not None:
                stats[int(name)] = of_layer
        if self.with_head:
            x = self.final_layernorm(x)
        return x, stats

    def head(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]: the product with the token table. Tensor-parallel processes get V / size of them each.

        Raises:
            ValueError: a pipeline stage without the head.
        """
        if not self.with_head:
            raise ValueError("this pipeline stage has no head, so it gives no logits; call hidden_states")
        return self.embedding.word_embeddings.logits(x_BSH)

    def moe_loss(self, aux_loss: torch.Tensor, z_loss: torch.Tensor) -> torch.Tensor:
        """What MoE layers add to the LM loss: the sums of their losses, scaled by the coefficients."""
        return self.moe.aux_loss_coeff * aux_loss + self.moe.moe_z_loss_coeff * z_loss
