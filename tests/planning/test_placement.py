"""Layers on pipeline stages."""

import itertools
import random

import pytest

from megatron.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from megatron.config.presets import PRESETS
from megatron.planning.placement import balanced, layer_costs, place_layers


def run(layers: int = 24, stages: int = 4, experts: int = 1, expert_parallel: int = 1, split: str | None = None):
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, moe_expert_parallel_size=(expert_parallel,), pipeline_layer_split=split
    )
    model = ModelConfig(num_layers=layers, hidden_size=1024, num_attention_heads=16, seq_length=2048)
    return RunConfig(model=model, moe=MoEConfig(num_experts=(experts,)), parallel=parallel)


def brute_force(costs: list[float], stages: int) -> float:
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts)


def test_the_costliest_stage_costs_as_little_as_possible():
    draw = random.Random(0)
    for _ in range(50):
        costs = [draw.choice((0.1, 1.0, draw.random())) for _ in range(draw.randint(1, 9))]
        stages = draw.randint(1, len(costs))
        lengths = balanced(costs, stages)
        assert len(lengths) == stages
        assert min(lengths) >= 1
        assert sum(lengths) == len(costs)
        ends = [0, *itertools.accumulate(lengths)]
        found = max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))
        assert found == pytest.approx(brute_force(costs, stages))


def test_equal_layers_are_spread_evenly():
    assert balanced([1.0] * 24, 4) == (6, 6, 6, 6)
    assert balanced([0.1] * 10, 1) == (10,)
    assert sorted(balanced([0.1] * 10, 4)) == [2, 2, 3, 3]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 layers cannot fill 4 pipeline stages; use 3"):
        balanced([1.0] * 3, 4)


def test_the_stage_with_the_head_gets_fewer_layers():
    placed = place_layers(run(), 50304)
    assert sum(placed.layers) == 24
    assert placed.layers[-1] == min(placed.layers) < 6
    assert sum(placed.costs) == pytest.approx(1.0)
    assert max(placed.costs) < 0.3


def test_experts_cost_memory_unless_they_are_spread():
    crowded, spread = (layer_costs(run(experts=64, expert_parallel=ep), 50304) for ep in (1, 64))
    dense, moe = 2, 3  # every second layer has experts
    assert crowded[moe] > 1.15 * crowded[dense]
    assert spread[moe] == pytest.approx(spread[dense], rel=0.05)  # but for the router, a top-1 layer is as a dense one


def test_a_given_split_wins_and_is_shown_with_its_costs():
    placed = place_layers(run(layers=8, stages=2, split="6,2"), 50304)
    assert placed.layers == (6, 2)
    assert str(placed).startswith("pipeline stages: layers 0-5 (")
    assert ", layers 6-7 (" in str(placed)


@pytest.mark.parametrize("preset", PRESETS)
def test_published_models_can_be_placed(preset):
    import megatron.config.run as options

    config = options.build(PRESETS[preset] | {"pipeline_model_parallel_size": 4})
    assert max(place_layers(config, 50304).costs) < 0.35
