"""How many parameters a model has, in closed form: nothing is allocated, so any size can be counted anywhere.

Letters: H hidden size, F inner size of a feed-forward, E experts of a layer, K top-k, V padded vocabulary, S positions.
"""

import dataclasses

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, over all processes."""

    total: int
    active: int  # that take part in the computation of one token: all but the experts it is not routed to
    expert: int  # inside experts, of all layers; these are divided by the expert-parallel size

    @property
    def dense(self) -> int:
        """Parameters outside the experts; every process holds all of them."""
        return self.total - self.expert


def count_parameters(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> ParameterCount:
    """Count the parameters of ``GPTModel(model, moe, vocab_size)`` exactly.

    Embeddings (V + S)·H, the output head being tied to the first; per layer, two norms 4H, attention 4H² + 4H and a
    feed-forward 2HF + F + H. In an MoE layer the feed-forward stands E times, beside a router EH without bias; a
    residual one has a dense feed-forward too and a Linear(H, 2) that mixes the two. A last norm adds 2H.

    Args:
        vocab_size: the padded vocabulary (:meth:`ModelConfig.padded_vocab_size`).
    """
    hidden, ffn = model.hidden_size, model.ffn_size
    feed_forward = 2 * hidden * ffn + ffn + hidden
    dense = (vocab_size + model.position_rows) * hidden + 2 * hidden
    expert = routed = 0
    for layer in range(model.num_layers):
        dense += 4 * hidden + 4 * hidden**2 + 4 * hidden
        experts = moe.experts_of_layer(layer)
        if experts == 1:
            dense += feed_forward
            continue
        dense += experts * hidden
        if moe.mlp_type == "residual":
            dense += feed_forward + 2 * hidden + 2
        expert += experts * feed_forward
        routed += moe.topk * feed_forward
    return ParameterCount(total=dense + expert, active=dense + routed, expert=expert)
