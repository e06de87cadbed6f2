"""The shape of the GPT model."""

import dataclasses
import math

from megatron.config.fields import option


@dataclasses.dataclass
class ModelConfig:
    """A GPT with learned positions, pre-LayerNorm, GELU, biases and tied embeddings (GPT-2 / GPT-3)."""

    num_layers: int = option(24, "Number of transformer layers.")
    hidden_size: int = option(1024, "Width of the residual stream.")
    num_attention_heads: int = option(16, "Attention heads; must divide --hidden-size.")
    ffn_hidden_size: int | None = option(None, "Inner width of the feed-forward layers (default: 4 x --hidden-size).")
    seq_length: int = option(2048, "Tokens of a training sequence.")
    max_position_embeddings: int | None = option(None, "Rows of the position table (default: --seq-length).")
    make_vocab_size_divisible_by: int = option(
        128, "The vocabulary is padded to a multiple of this that the tensor-parallel processes can share."
    )
    init_method_std: float = option(0.02, "Standard deviation of the initial weights.")
    hidden_dropout: float = option(0.1, "Dropout on embeddings and on the output of each attention and feed-forward.")
    attention_dropout: float = option(0.1, "Dropout on attention probabilities.")
    layernorm_epsilon: float = option(1e-5, "Epsilon of the layer norms.")

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
