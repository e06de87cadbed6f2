"""What the ranks of a run send in one update, before it is launched: bytes by purpose, inside nodes and between them.

All figures are means over the ranks. A collective is counted as its usual algorithm sends it: with n ranks and b bytes
on each, a ring all-reduce sends 2 (n - 1) / n b from each rank, an all-gather and a reduce-scatter (n - 1) / n of the
whole, and an all-to-all (n - 1) / n b. A ring goes through the ranks in order, so only a node's last rank sends to
another node. Tokens go straight to their experts' ranks, not by way of nodes. Reductions of a few numbers (norms,
losses for the log) are left out.

Gradients are summed once an update, in fp32 unless ``--grad-reduce-in-bf16`` says otherwise: with bf16 weights by a
reduce-scatter (:mod:`megatron.engine.bf16_update`), with others by DeepSpeed's all-reduce. ZeRO-1 spreads the
optimizer's state and work, and then the weights are gathered.

Shapes: T tokens of a micro-batch, H hidden, E experts, K top-k, n ranks of a group.
"""

import dataclasses

import numpy as np

from megatron.config import RunConfig
from megatron.moe.plan import expert_capacity
from megatron.parallel.grid import Grid
from megatron.planning.parameters import parameters_of_stage


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one update, on average, to ranks of its own node and to others."""

    inside: float = 0.0
    between: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.inside + self.between

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.inside + other.inside, self.between + other.between)


PURPOSES = {
    "dense": "gradients and weights outside the experts, over data-parallel ranks",
    "experts": "gradients and weights of the experts, over expert-data-parallel ranks",
    "all-to-all": "tokens to their experts and back",
    "tensor": "activations and their gradients, over tensor-parallel ranks",
    "pipeline": "activations and their gradients to the next and the previous stage; the token table's gradient",
}


def communication(config: RunConfig, world: int, vocab_size: int, node: int = 8) -> dict[str, Traffic]:
    """What a rank sends in one update of the full global batch, by :data:`PURPOSES`.

    Dropless layers are counted as if every expert got equally many tokens.

    Args:
        config: of a run; it must fit ``world`` ranks.
        vocab_size: padded.
        node: ranks of a node, which are neighbours in rank order.
    """
    parallel = config.parallel
    grid = Grid(
        world,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.enable_expert_tensor_parallelism,
    )
    links = _Links(grid, node)
    width = 4 if config.optimizer.precision == "fp32" else 2
    of_gradient = 2 if config.optimizer.grad_reduce_in_bf16 else 4
    if config.optimizer.precision != "bf16":
        of_gradient *= 2  # an all-reduce sends twice what a reduce-scatter does
    micro_batches = config.training.global_batch_size / (config.training.micro_batch_size * grid.data)
    dense, experts = _parameters_of_a_rank(config, vocab_size)
    result = dict.fromkeys(PURPOSES, Traffic())
    result["dense"] = _update_of(dense, of_gradient, width, grid.data, links.ring("data"))
    for degree, count in experts.items():
        ranks = grid.groups("expert_data", degree).shape[1]
        result["experts"] += _update_of(count, of_gradient, width, ranks, links.ring("expert_data", degree))
    for degree, rows in _rows_exchanged(config).items():
        sent = rows * config.model.hidden_size * width * micro_batches / grid.pipeline * (degree - 1) / degree
        result["all-to-all"] += links.pairs("expert", degree).of(sent)
    result["tensor"] = links.ring("tensor").of(_tensor_bytes(config, width) * micro_batches / grid.pipeline)
    result["pipeline"] = _pipeline(config, grid, links, vocab_size, width, micro_batches)
    return result


# ------------------------------------------------------------------------------------------------------- what is sent


def _parameters_of_a_rank(config: RunConfig, vocab_size: int) -> tuple[float, dict[int, float]]:
    """Parameters outside the experts, and expert parameters by degree."""
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    held = parameters_of_stage(config, vocab_size, range(model.num_layers), first=True, last=True)
    second_table = vocab_size * model.hidden_size / parallel.tensor_model_parallel_size if stages > 1 else 0
    return (held.dense + second_table) / stages, {degree: count / stages for degree, count in held.experts.items()}


def _rows_exchanged(config: RunConfig) -> dict[int, int]:
    """Rows of H numbers that a rank hands to all-to-alls for one micro-batch, all layers together, by degree.

    Forward a layer sends tokens to experts and their outputs back; backward and recomputation each do the same.
    """
    moe, tensor = config.moe, config.parallel.tensor_model_parallel_size
    share = 1 if config.parallel.enable_expert_tensor_parallelism else tensor  # replicated experts divide the plan
    tokens = config.training.micro_batch_size * config.model.seq_length
    rows: dict[int, int] = {}
    for layer in range(config.model.num_layers):
        experts, degree = moe.experts_of_layer(layer), config.expert_parallel_degree(layer)
        if degree == 1:
            continue
        buffer = tokens * moe.topk // share
        if moe.moe_token_dropping:
            capacity = expert_capacity(tokens, experts, moe.topk, moe.moe_train_capacity_factor, moe.moe_min_capacity)
            buffer = experts * -(-capacity // share)
        rows[degree] = rows.get(degree, 0) + 2 * buffer * _passes(config)
    return rows


def _passes(config: RunConfig) -> int:
    """How often a layer's exchanges happen: forward, backward, and with activation checkpointing forward again."""
    return 3 if config.training.checkpoint_activations else 2


def _tensor_bytes(config: RunConfig, width: int) -> float:
    """Bytes that a rank sends to its tensor-parallel neighbours for one micro-batch, all stages together.

    A pair of shared matrices costs one all-reduce of the activations forward and one backward; with sequence
    parallelism a reduce-scatter and an all-gather each time, which is as much.
    """
    model, moe, parallel = config.model, config.moe, config.parallel
    size, sequence = parallel.tensor_model_parallel_size, parallel.sequence_parallel
    if size == 1:
        return 0.0
    hidden, tokens = model.hidden_size, config.training.micro_batch_size * model.seq_length
    stream, passes = tokens * hidden * width, _passes(config)
    reduced = 2.0 * stream  # the embedding's output, the gradient of what the head reads
    reduced += 3 * tokens * 4  # largest logits; sums and labels' logits
    gathered = 0.0
    if sequence:
        gathered += model.seq_length * hidden * width  # the gradient of the position table
        reduced += 2 * hidden * 4  # gradients of the last norm
    for layer in range(model.num_layers):
        experts = moe.experts_of_layer(layer)
        pairs = 1 + (experts == 1 or moe.mlp_type == "residual")
        if experts > 1:
            apart = not (moe.moe_token_dropping or parallel.enable_expert_tensor_parallelism)
            pairs += not (sequence and apart)  # dropless replicated experts then serve the rank's own tokens
            reduced += tokens * moe.topk * 4  # the gates' gradient
            if sequence:
                gathered += (passes - 1) * tokens * experts * 4  # logits of the router
                reduced += experts * hidden * 4  # the gradient of its weight
                reduced += (moe.mlp_type == "residual") * (2 * hidden + 2) * 4
            else:
                gathered += (passes - 1) * tokens * moe.topk * 8  # choices and slots (kernels for top-1: half as much)
        reduced += pairs * passes * stream
        if sequence:  # gradients of two norms, and of the biases that follow a sum
            reduced += (4 + 1 + (experts == 1 or moe.mlp_type == "residual")) * hidden * 4
    return (2 * reduced + gathered) * (size - 1) / size


def _pipeline(
    config: RunConfig, grid: Grid, links: "_Links", vocab_size: int, width: int, micro_batches: float
) -> Traffic:
    if grid.pipeline == 1:
        return Traffic()
    training, hidden = config.training, config.model.hidden_size
    stream = training.micro_batch_size * config.model.seq_length * hidden * width
    if config.parallel.sequence_parallel:
        stream //= grid.tensor
    boundaries = (grid.pipeline - 1) / grid.pipeline
    sends = links.steps("pipeline").of(2 * boundaries * stream * micro_batches)
    table = vocab_size * hidden / grid.tensor * 4  # fp32, an all-reduce between two of the stages
    return sends + links.ring("embedding").of(table * 2 / grid.pipeline)


def _update_of(weights: float, of_gradient: int, of_weight: int, ranks: int, links: "_Split") -> Traffic:
    """Sum of the gradients and all-gather of the weights: what a rank sends for both, in bytes of each weight."""
    return links.of(weights * (of_gradient + of_weight) * (ranks - 1) / ranks)


# -------------------------------------------------------------------------------------------------------- where it goes


@dataclasses.dataclass(frozen=True)
class _Split:
    """The share of a traffic that leaves the node."""

    between: float

    def of(self, sent: float) -> Traffic:
        return Traffic(sent * (1 - self.between), sent * self.between)


class _Links:
    """How much of what the groups of a grid send goes to other nodes, on average."""

    def __init__(self, grid: Grid, node: int) -> None:
        self._grid, self._node = grid, node

    def ring(self, kind: str, degree: int = 1) -> _Split:
        """Each rank sends to the next one, the last to the first."""
        nodes = self._grid.groups(kind, degree) // self._node
        return _Split(float((nodes != np.roll(nodes, -1, axis=1)).mean()))

    def steps(self, kind: str) -> _Split:
        """Neighbours send to each other."""
        nodes = self._grid.groups(kind) // self._node
        return _Split(float((nodes[:, 1:] != nodes[:, :-1]).mean()))

    def pairs(self, kind: str, degree: int) -> _Split:
        """Each rank sends equally much to every other one."""
        nodes = self._grid.groups(kind, degree) // self._node
        crossing = sum(int((row[:, None] != row).sum()) for row in nodes)
        return _Split(crossing / (nodes.shape[0] * degree * (degree - 1)))
