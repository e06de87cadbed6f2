"""Causal self-attention with many heads.

Shapes: B batch, S sequence (of new tokens), M keys (cached and new), N heads (of this process), D head size,
H hidden = D * heads of all processes.
"""

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.config import ModelConfig
from megatron.model.document_attention import document_attention
from megatron.model.norm import build_head_norm
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.randomness import own_randomness
from megatron.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear

# With dropout, the first of these that can: flash attention drops 26 of 256 for 0.1, the others as many as asked for.
# cuDNN's attention, which torch prefers on Hopper, is left out: some releases round the probability to sixteenths, so
# that 0.1 becomes 0.0625 or 0.125. Without dropout the choice is torch's.
DROPOUT_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KeyValueCache(Protocol):
    """What the model needs of a cache; ``megatron.inference.kv_cache`` has the real one."""

    def begin(self, count: int) -> torch.Tensor:
        """Make room for ``count`` new tokens of each sequence; returns their positions, int64 [B, count]."""
        ...

    def append(
        self, layer: int, k_BNSD: torch.Tensor, v_BNSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store a layer's new keys and values.

        Returns:
            k_BNMD, v_BNMD: cached and new ones; and the mask, bool [B, 1, S, M], True where a new token may look, or
            None when nothing was cached before, so that plain causal attention is right.
        """
        ...


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V over the tokens up to each one's own, in N heads.

    ``qkv.weight`` is [3H, H] with the rows of Q first, then K, then V, and inside each the rows of head 0, head 1, ...:
    row ``part * H + n * D + d``. A tensor-parallel shard takes the rows of its heads out of each of the three parts.
    Hugging Face's GPT-2 orders the columns of ``c_attn.weight`` [H, 3H] alike, so the two are transposes of each other.

    With ``qk_layernorm`` Q and K are normalized over the D numbers of each head (Dehghani et al. 2023, arXiv
    2302.05442). As in Megatron-LM, all heads share a norm's weight and bias. A cache holds normalized keys.
    """

    def __init__(self, model: ModelConfig, layer: int, tensor_group: TensorGroup = ALONE) -> None:
        super().__init__()
        H, heads = model.hidden_size, model.num_attention_heads
        if H % heads:
            raise ValueError(f"hidden_size {H} does not divide by num_attention_heads {heads}")
        self.num_heads = tensor_group.shard_size(heads, "attention heads:")
        self.head_size = H // heads
        self.tensor_group = tensor_group
        self.dropout = model.attention_dropout
        self.layer = layer
        self.qkv = ColumnParallelLinear(H, 3 * H, tensor_group, parts=3)
        self.q_layernorm = build_head_norm(model, tensor_group) if model.qk_layernorm else None
        self.k_layernorm = build_head_norm(model, tensor_group) if model.qk_layernorm else None
        self.dense = RowParallelLinear(H, H, tensor_group)

    def forward(
        self, x_BSH: torch.Tensor, cache: KeyValueCache | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from each token of ``x_BSH`` to itself and those before it, cached ones included; [B, S, H].

        With ``cu_seqlens``, int32 [documents + 1], only to those of its own document; see :func:`document_attention`.
        """
        q, k, v = self.queries_keys_values(x_BSH)
        B, _, S, _ = q.shape
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self.layer, k, v)  # (B, N, M, D)
        dropout = self.dropout if self.training else 0.0
        own = own_randomness(self.tensor_group, q.device) if dropout and self.tensor_group.size > 1 else nullcontext()
        backends = sdpa_kernel(DROPOUT_BACKENDS) if dropout else nullcontext()
        with own, backends:  # other heads, other dropout
            if cu_seqlens is not None:
                y = document_attention(q, k, v, cu_seqlens, dropout)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.dense(y.transpose(1, 2).reshape(B, S, -1))  # (B, N, S, D) -> (B, S, N * D) -> (B, S, H)

    def queries_keys_values(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each [B, N, S, D], queries and keys normalized if the model does that."""
        qkv = self.qkv(x_BSH)  # with sequence parallelism x has a piece of the sequence, and this has all of it
        B, S, _ = qkv.shape
        qkv = qkv.view(B, S, 3, self.num_heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            # in the order of memory (B, S, N, D), in which attention then answers too
            q = self.q_layernorm(q.transpose(1, 2)).transpose(1, 2)
            k = self.k_layernorm(k.transpose(1, 2)).transpose(1, 2)
        return q, k, v
