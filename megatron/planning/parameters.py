"""How many parameters a model has, in closed form: nothing is allocated, so any size can be counted anywhere.

Shapes: H hidden size, F inner size of a feed-forward, E experts of a layer, K top-k, V padded vocabulary, S positions.
"""

import dataclasses
from collections.abc import Iterable

from megatron.config import ModelConfig, MoEConfig, RunConfig


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


@dataclasses.dataclass(frozen=True)
class StageParameters:
    """Parameters that one process holds: outside experts, and inside them by degree of expert parallelism."""

    dense: int
    experts: dict[int, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + sum(self.experts.values())


def parameters_of_stage(
    config: RunConfig, vocab_size: int, layers: Iterable[int], *, first: bool, last: bool
) -> StageParameters:
    """Count what a process of a pipeline stage holds, with tensor and expert parallelism.

    Tensor parallelism cuts the token table, Q, K and V with their biases, both matrices of attention and feed-forward
    and the feed-forward's inner bias; it cuts experts only with ``--enable-expert-tensor-parallelism``.

    Args:
        vocab_size: padded.
        layers: numbers of the stage's layers.
        first: the stage has the embedding.
        last: it has the last norm and the head; the head's token table is a second one if it is not ``first`` too.
    """
    model, moe, parallel = config.model, config.moe, config.parallel
    hidden, ffn, tensor = model.hidden_size, model.ffn_size, parallel.tensor_model_parallel_size
    table = vocab_size * hidden // tensor
    feed_forward = (2 * hidden * ffn + ffn) // tensor + hidden
    dense = (table + model.position_rows * hidden) * first + (2 * hidden + table * (not first)) * last
    experts: dict[int, int] = {}
    for layer in layers:
        count, degree = moe.experts_of_layer(layer), config.expert_parallel_degree(layer)
        dense += 4 * hidden + (4 * hidden**2 + 3 * hidden) // tensor + hidden
        if count == 1:
            dense += feed_forward
            continue
        dense += count * hidden
        if moe.mlp_type == "residual":
            dense += feed_forward + 2 * hidden + 2
        pieces = degree * (tensor if parallel.enable_expert_tensor_parallelism else 1)
        experts[degree] = experts.get(degree, 0) + count * (2 * hidden * ffn + ffn + hidden) // pieces
    return StageParameters(dense, experts)
