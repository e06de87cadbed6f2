import math

import pytest

from megatron.config import OptimizerConfig
from megatron.engine.schedule import learning_rate


def config(**changes):
    return OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_tokens=1000, **changes)


def test_the_first_update_has_a_rate_above_zero():
    assert learning_rate(config(), 10, 10_000) == pytest.approx(1e-5)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_warm_up_ends_at_the_peak(style):
    assert learning_rate(config(lr_decay_style=style), 1000, 10_000) == pytest.approx(1e-3)


@pytest.mark.parametrize(("style", "middle"), [("cosine", 0.5), ("linear", 0.5)])
def test_decay_reaches_the_minimum_and_stays_there(style, middle):
    rate = config(lr_decay_style=style)
    assert learning_rate(rate, 5500, 10_000) == pytest.approx(1e-4 + middle * 9e-4)
    assert learning_rate(rate, 10_000, 10_000) == pytest.approx(1e-4)
    assert learning_rate(rate, 50_000, 10_000) == pytest.approx(1e-4)


def test_cosine_follows_its_formula_between():
    expected = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 0.25))
    assert learning_rate(config(), 1000 + 9000 // 4, 10_000) == pytest.approx(expected)


def test_constant_never_falls():
    assert learning_rate(config(lr_decay_style="constant"), 10**9, 10_000) == 1e-3
