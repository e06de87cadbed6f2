"""Which transformer layers are on which pipeline stage.

A pipeline is as fast as its slowest stage, so layers are placed such that the costliest stage costs as little as
possible. The cost of a layer is its share of the model's time plus ``MEMORY_WEIGHT`` times its share of the memory
of one process per stage:

* time: forward FLOPs of a token. A top-1 MoE layer takes about the time of a dense one.
* memory: parameters that one process holds. An MoE layer has E / EP experts there, EP being its own degree.
* The embedding (no FLOPs, a token table) is on the first stage, the head (its FLOPs, and the table again) on the
  last one.
"""

import dataclasses

from megatron.config import RunConfig
from megatron.planning.flops import head_flops_per_token, layer_flops_per_token
from megatron.planning.parameters import parameters_of_layer

MEMORY_WEIGHT = 0.1
"""What a share of the memory costs, compared with the same share of the time: time decides, memory breaks ties."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Number of transformer layers and cost of each stage; the costs of all stages add up to 1."""

    layers: tuple[int, ...]
    costs: tuple[float, ...]

    def layers_of(self, stage: int) -> range:
        """Numbers of the layers on a stage, both from 0."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def __str__(self) -> str:
        stages = []
        for stage, cost in enumerate(self.costs):
            layers = self.layers_of(stage)
            stages.append(f"layers {layers[0]}-{layers[-1]} ({cost:.1%})")
        return "pipeline stages: " + ", ".join(stages) + "; set --pipeline-layer-split to place them otherwise"


def place_layers(config: RunConfig, vocab_size: int) -> Placement:
    """Place the layers of a run as ``--pipeline-layer-split`` says, by default by cost.

    Args:
        config: a configuration that has been validated.
        vocab_size: padded.
    """
    costs = layer_costs(config, vocab_size)
    layers = config.parallel.layers_of_stages or balanced(costs, config.parallel.pipeline_model_parallel_size)
    ends = [sum(layers[: stage + 1]) for stage in range(len(layers))]
    starts = [0, *ends[:-1]]
    return Placement(layers, tuple(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)))


def layer_costs(config: RunConfig, vocab_size: int) -> list[float]:
    """Cost of each transformer layer, the embedding's added to the first and the head's to the last; their sum is 1."""
    model, moe, hidden = config.model, config.moe, config.model.hidden_size
    time = [layer_flops_per_token(model, moe, layer, model.seq_length) for layer in range(model.num_layers)]
    memory = []
    for layer in range(model.num_layers):
        held = parameters_of_layer(model, moe, layer, config.expert_parallel_degree(layer))
        memory.append(held.dense + held.expert)
    time[-1] += head_flops_per_token(model, vocab_size)
    memory[0] += (vocab_size + model.position_rows) * hidden
    memory[-1] += vocab_size * hidden
    total_time, total_memory = sum(time), sum(memory)
    return [
        (t / total_time + MEMORY_WEIGHT * m / total_memory) / (1 + MEMORY_WEIGHT)
        for t, m in zip(time, memory, strict=True)
    ]


_Cut = tuple[float, float, tuple[int, ...]]  # largest sum, sum of squares, lengths


def balanced(costs: list[float], stages: int) -> tuple[int, ...]:
    """Cut ``costs`` into ``stages`` runs, none empty, such that the largest sum is smallest; returns their lengths.

    Dynamic programming over (stages, layers); among equally good cuts it takes one with a small sum of squares.

    Raises:
        ValueError: there are more stages than layers.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot fill {stages} pipeline stages; use {len(costs)} stages or fewer")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[n]: of the first n layers on the stages so far
    best: list[_Cut | None] = [(0.0, 0.0, ()), *[None] * len(costs)]
    for _ in range(stages):
        new: list[_Cut | None] = [None] * (len(costs) + 1)
        for end in range(1, len(costs) + 1):
            for start in range(end - 1, -1, -1):
                cost = before[end] - before[start]
                known, rest = new[end], best[start]
                if known is not None and round(cost, 9) > known[0]:
                    break  # a longer last stage costs even more
                if rest is None:
                    continue
                largest, squares, lengths = rest
                # rounded: sums of equal costs that differ in the last bit are equally good
                found = (round(max(largest, cost), 9), round(squares + cost**2, 9), (*lengths, end - start))
                if known is None or found < known:
                    new[end] = found
        best = new
    assert best[-1] is not None  # there are at least as many layers as stages
    return best[-1][2]
