"""A resumed run goes on with the loss scale of the old one, under its own flags."""

import json

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megatron.engine.loss_scale import headroom, load_scaler_state, scaler_state


def dynamic(power: int = 16, window: int = 1000, least: float = 1.0, hysteresis: int = 2) -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2.0**power, scale_window=window, min_scale=least, delayed_shift=hysteresis,
        consecutive_hysteresis=False, raise_error_at_min_scale=False,
    )  # fmt: skip


def updated(scaler: DynamicLossScaler, *overflows: bool) -> DynamicLossScaler:
    for overflow in overflows:
        scaler.update_scale(overflow)
    return scaler


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # which the scaler asks before it logs


def resumed(new, old):
    load_scaler_state(new, json.loads(json.dumps(scaler_state(old))))
    return new


def resumed_from_earlier_version(new, old):
    """Checkpoints used to hold every number of the scaler."""
    saved = {name: value for name, value in vars(old).items() if isinstance(value, int | float | bool)}
    load_scaler_state(new, json.loads(json.dumps(saved)))
    return new


both = pytest.mark.parametrize("resume", [resumed, resumed_from_earlier_version])
HISTORY = (False, True, True, False, False)  # the scale is halved once


@both
def test_the_same_flags_go_on_as_without_a_resume(resume):
    going_on = (False, False, True, False, False, False, True, True, False)
    for at in range(len(HISTORY)):
        there = updated(dynamic(window=3), *HISTORY, *going_on)
        again = updated(resume(dynamic(window=3), updated(dynamic(window=3), *HISTORY[:at])), *HISTORY[at:], *going_on)
        assert vars(again) == vars(there)


@both
def test_a_fixed_scale_is_that_of_the_new_flags(resume):
    assert resume(LossScaler(128.0), updated(dynamic(), *HISTORY)).loss_scale == 128.0
    assert resume(LossScaler(128.0), LossScaler(64.0)).loss_scale == 128.0


@both
def test_after_a_fixed_scale_the_dynamic_one_starts_as_the_flags_say(resume):
    assert vars(resume(dynamic(power=12), LossScaler(128.0))) == vars(dynamic(power=12))


@both
def test_another_window_counts_from_the_last_overflow(resume):
    scaler = resume(dynamic(power=4, window=3), updated(dynamic(), *HISTORY))
    assert (scaler.cur_scale, scaler.scale_window) == (2.0**15, 3)
    assert updated(scaler, False).cur_scale == 2.0**15
    assert updated(scaler, False).cur_scale == 2.0**16, "the first good update that is a multiple of 3 after it"


@both
def test_the_new_least_scale_and_hysteresis_hold(resume):
    scaler = resume(dynamic(least=2.0**15 + 1), updated(dynamic(), *HISTORY))
    assert (scaler.cur_scale, scaler.min_scale) == (2.0**15 + 1, 2.0**15 + 1)
    one_used = updated(dynamic(hysteresis=3), True)
    assert [resume(dynamic(hysteresis=new), one_used).cur_hysteresis for new in (1, 2, 3, 5)] == [1, 1, 2, 4]
    assert resume(dynamic(hysteresis=5), one_used).delayed_shift == 5


def test_without_a_state_the_flags_hold():
    scaler = dynamic(power=12)
    load_scaler_state(scaler, None)
    assert vars(scaler) == vars(dynamic(power=12))
    assert scaler_state(LossScaler(128.0)) is None


def test_an_overflow_takes_of_the_headroom_until_the_scale_can_fall_no_further():
    scaler = dynamic(power=2, least=1.0)
    seen = [headroom(scaler)] + [headroom(updated(scaler, True)) for _ in range(5)]
    assert seen == [(4.0, 2), (4.0, 1), (2.0, 1), (1.0, 1), (1.0, 1), (1.0, 1)]
    fixed = LossScaler(128.0)
    fixed.update_scale(True)
    assert headroom(fixed) == headroom(LossScaler(128.0))
