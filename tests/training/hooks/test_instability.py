"""When a figure has run away, and how often that is said."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig, RunConfig
from megatron.engine.base import StepResult
from megatron.model.loss import LossSums
from megatron.training.clock import Step
from megatron.training.hooks.hook import Outcome
from megatron.training.hooks.instability import LEAST, MOST, GrowthDetector, History, InstabilityWarnings

USUAL = [8.0, 9.0, 7.0] * 5  # median 8


def feed(detector: GrowthDetector, values: list[float], place: str = "layer 0") -> list[float]:
    """The values at which it warned."""
    grown = (detector.add({place: value, "layer 7": 1.0}) for value in values)
    return [growth.value for growth in grown if growth is not None]


def test_tenfold_growth_is_said_once_until_it_has_come_back_down():
    detector = GrowthDetector(floor=50.0)
    assert feed(detector, [*USUAL, 79.0, 81.0, 82.0, 900.0, 9000.0, 30.0, 8.0, 7.0]) == [82.0]
    assert feed(detector, [200.0, 300.0]) == [300.0]


@pytest.mark.parametrize(
    "values",
    [
        [*USUAL, 900.0, 8.0, 900.0, 8.0],  # single noisy values
        [0.01] * 15 + [0.5] * 5 + [4.0] * 10 + [20.0] * 40 + [49.0] * 100,  # warm-up of attention logits
        [*USUAL[: LEAST - 1], 900.0, 900.0],  # too few to compare with
        [*USUAL, math.inf, math.nan, math.inf, 8.0],  # skipped updates
    ],
)
def test_what_is_no_alarm(values):
    assert feed(GrowthDetector(floor=50.0), values) == []


def test_gradients_fall_from_a_high_start_and_rise_without_an_alarm():
    """The norms of a healthy run: 10 at first, 0.1 in the end, and ten times that is still below the clipping."""
    detector = GrowthDetector(floor=1.0)
    assert feed(detector, [10.0 / (1 + n) + 0.1 for n in range(200)] + [0.99, 0.99, 0.99]) == []


def test_slow_growth_is_found():
    """A gradient norm as in a run that diverged: 0.5 for half of 760 log lines, then it doubles every 83."""
    values = [0.5] * 380 + [0.5 * 2 ** (n / 83) for n in range(380)]
    (value,) = feed(GrowthDetector(floor=1.0), values)
    assert 5.0 < value < 8.0


def test_the_worst_place_is_named():
    detector = GrowthDetector(floor=1.0)
    for _ in range(LEAST):
        assert detector.add({"a": 1.0, "b": 2.0, "c": 1.0}) is None
    assert detector.add({"a": 30.0, "b": 40.0, "c": 1.0}) is None
    grown = detector.add({"a": 30.0, "b": 41.0, "c": 99.0})
    assert grown is not None
    assert (grown.place, grown.value, grown.median) == ("a", 30.0, 1.0)


def test_a_saved_detector_goes_on_as_it_would_have():
    values = [*USUAL * 6, 100.0, 100.0, 100.0, 8.0, 100.0, 100.0]
    for at in range(len(values)):
        detector, again = GrowthDetector(50.0), GrowthDetector(50.0)
        before = feed(detector, values[:at])
        again.load_state(json.loads(json.dumps(detector.state())))
        assert before + feed(again, values[at:]) == [100.0, 100.0], at


def test_a_history_is_spread_evenly_over_the_run():
    history = History()
    for value in range(1000):
        history.add(float(value))
    assert MOST / 2 < len(history.values) <= MOST
    assert history.values == [float(n * history.every) for n in range(len(history.values))]


def hook(**model: Any) -> tuple[InstabilityWarnings, list[dict]]:
    """A hook, and what it logs."""
    logged: list[dict] = []
    made = InstabilityWarnings(
        RunConfig(
            model=ModelConfig(num_layers=4, **model),
            moe=MoEConfig(num_experts=(8,)),
            optimizer=OptimizerConfig(clip_grad=1.0),
        )
    )
    run: Any = SimpleNamespace(log=lambda kind, **values: logged.append({"kind": kind} | values))
    made.run = run
    return made, logged


def outcome(number: int, attention: float = 5.0, router: float = 2.0, experts: float = 0.1) -> Outcome:
    monitors = {
        "max_attention_logit": [4.0, 5.0, attention, 3.0],
        "max_router_logit": [2.0, router],
        "router_logit_std": [1.0, 1.0],
        "router_entropy": [2.0, 2.0],
        "grad_norm": {"attention": 0.2, "router": 0.1, "experts": experts, "embedding": 0.1, "rest": 0.2},
    }
    result = StepResult(LossSums(torch.ones(4), [], torch.zeros(0)), 1e-3, 1.0, read_monitors=lambda: monitors)
    return Outcome(Step(number, 0, 16), result, 2.0)


def test_the_line_names_figure_layer_value_and_what_helps():
    made, logged = hook()
    for number in range(LEAST):
        made.on_outcome(outcome(number))
    for number in range(5):
        made.on_outcome(outcome(LEAST + number, attention=812.0, router=99.0, experts=1.5))
    attention, router, gradients = logged
    assert {record["kind"] for record in logged} == {"warning"}
    assert attention["reason"] == (
        "max_attention_logit of layer 2 has grown to 812, 162 times its running median of 5; a lower --lr helps, and "
        "--qk-layernorm in a new run"
    )
    assert (attention["figure"], attention["place"], attention["value"]) == ("max_attention_logit", "layer 2", 812.0)
    assert router["reason"].startswith("max_router_logit of layer 3 has grown to 99, 49.5 times")
    assert "--moe-z-loss-coeff" in router["reason"]
    assert gradients["place"] == "experts parameters"


def test_a_model_with_qk_layernorm_is_not_told_to_use_it():
    made, logged = hook(qk_layernorm=True)
    for number in range(LEAST + 2):
        made.on_outcome(outcome(number, attention=5.0 if number < LEAST else 812.0))
    assert len(logged) == 1
    assert logged[0]["reason"].endswith("; a lower --lr helps")


def test_an_update_without_figures_is_none_to_compare():
    made, logged = hook()
    before = made.state_dict()
    made.on_outcome(Outcome(Step(1, 0, 16), StepResult(LossSums(torch.ones(4), [], torch.zeros(0)), 1e-3, 1.0), 2.0))
    assert made.state_dict() == before
    assert logged == []


def test_the_state_survives_a_checkpoint():
    made, _ = hook()
    for number in range(LEAST + 1):
        made.on_outcome(outcome(number, attention=5.0 if number < LEAST else 812.0))
    again, logged = hook()
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    again.on_outcome(outcome(LEAST + 1, attention=813.0))
    assert [record["value"] for record in logged] == [813.0]
    again.load_state_dict({})
    assert again.state_dict() == hook()[0].state_dict()
