"""The shape of the GPT model."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.config.errors import around, divisors
from megatron.config.option import option, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class ModelConfig:
    """A GPT with learned positions, pre-LayerNorm, GELU, biases and tied embeddings (GPT-2 / GPT-3)."""

    num_layers: int = option(24, "Number of transformer layers.", min=1, resumable=False)
    hidden_size: int = option(1024, "Width of the residual stream.", min=1, resumable=False)
    num_attention_heads: int = option(16, "Attention heads; must divide --hidden-size.", min=1, resumable=False)
    ffn_hidden_size: int | None = option(
        None, "Inner width of the feed-forward layers (default: 4 x --hidden-size).", min=1, resumable=False
    )
    seq_length: int = option(2048, "Tokens of a training sequence.", min=1, resumable=False)
    max_position_embeddings: int | None = option(
        None, "Rows of the position table (default: --seq-length).", min=1, resumable=False
    )
    make_vocab_size_divisible_by: int = option(
        128, "The vocabulary is padded to a multiple of this that the tensor-parallel processes can share.", min=1,
        resumable=True,
    )  # fmt: skip
    init_method_std: float = option(0.02, "Standard deviation of the initial weights.", above=0, finetunable=True)
    hidden_dropout: float = option(
        0.1, "Dropout on embeddings and on the output of each attention and feed-forward.", min=0, below=1,
        finetunable=True,
    )  # fmt: skip
    attention_dropout: float = option(0.1, "Dropout on attention probabilities.", min=0, below=1, finetunable=True)
    layernorm_epsilon: float = option(1e-5, "Epsilon of the layer norms.", above=0)
    qk_layernorm: bool = option(
        False, "Normalize queries and keys, each head by itself, before attention.", resumable=False
    )

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_position_embeddings or self.seq_length

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """``vocab_size`` rounded up to a multiple of ``make_vocab_size_divisible_by`` and ``tensor_parallel_size``.

        Rows of padding are part of the softmax, so their number must not depend on the layout without need: it is the
        same for every tensor-parallel size that divides ``make_vocab_size_divisible_by``.
        """
        multiple = math.lcm(self.make_vocab_size_divisible_by, tensor_parallel_size)
        return -(-vocab_size // multiple) * multiple


@rule("hidden_size", "num_attention_heads")
def attention_heads(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Attention heads divide the hidden size."""
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if hidden % heads:
        yield (
            f"--num-attention-heads {heads} must divide --hidden-size {hidden} ({hidden} = {hidden // heads} x {heads}"
            f" + {hidden % heads}); use {around(heads, divisors(hidden))} heads"
        )


@rule("seq_length", "max_position_embeddings")
def positions(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Every token of a sequence has a position."""
    length, rows = config.model.seq_length, config.model.position_rows
    if length > rows:
        yield (
            f"--seq-length {length} must not exceed --max-position-embeddings {rows}; use --seq-length {rows}"
            f" or --max-position-embeddings {length}"
        )
