"""When losses are a spike, what is left out, and where the run goes on."""

import dataclasses
import json
import math
import time

import pytest

from megatron.checkpoint.folder import CheckpointStatus, begin, commit, record_status
from megatron.config import GuardConfig
from megatron.training.clock import Step
from megatron.training.hooks.spikes import Spike, SpikeDetector, checkpoint_before

CONFIG = GuardConfig(spike_sigmas=5.0, spike_updates=3, spike_window=8)
USUAL = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9]  # median 2, median distance 0.075: the limit is 2 + 5 * 0.1112


def update(number: int) -> Step:
    return Step(number, 16 * (number - 1), 16 * number)


def feed(detector: SpikeDetector, losses: list[float], first: int = 1) -> list[Spike]:
    found = (detector.add(update(number), loss) for number, loss in enumerate(losses, start=first))
    return [spike for spike in found if spike is not None]


def test_so_many_high_losses_in_a_row_are_a_spike_of_as_many_updates_before_too():
    (spike,) = feed(SpikeDetector(CONFIG), [*USUAL, 3.0, 4.0, math.nan])
    assert (spike.first, spike.last) == (update(6), update(11))
    assert spike.median == 2.0
    assert spike.limit == pytest.approx(2 + 5 * 1.4826 * 0.075)


@pytest.mark.parametrize(
    "losses",
    [
        [*USUAL, 3.0, 4.0, 2.0, 3.0, 4.0],  # not in a row
        [*USUAL, 2.5, 2.5, 2.5, 2.5],  # below the limit
        [*USUAL[:7], 9.0, 9.0, 9.0],  # the window was not full
        [*USUAL, 0.1, 0.1, 0.1, 0.1],  # low
    ],
)
def test_no_spike(losses):
    assert feed(SpikeDetector(CONFIG), losses) == []


def test_after_a_spike_that_was_trained_through_its_losses_are_the_usual_ones():
    assert len(feed(SpikeDetector(CONFIG), USUAL + [4.0] * 30)) < 4


def test_a_saved_detector_goes_on_as_it_would_have():
    losses = [*USUAL, 2.2, 3.0, 4.0, math.nan, 2.0]
    for at in range(len(losses)):
        detector = SpikeDetector(CONFIG)
        before = feed(detector, losses[:at])
        again = SpikeDetector(CONFIG)
        again.load_state(json.loads(json.dumps(detector.state())))
        found = before + feed(again, losses[at:], first=at + 1)
        assert [(spike.first, spike.last) for spike in found] == [(update(7), update(12))], at


@pytest.mark.parametrize("sigmas", [None, 5.0])
def test_outliers_are_known_without_going_back_for_them(sigmas):
    detector = SpikeDetector(dataclasses.replace(CONFIG, spike_sigmas=sigmas))
    assert not detector.is_outlier(1e9), "nothing is known yet"
    assert detector.is_outlier(math.nan)
    assert detector.is_outlier(math.inf)
    feed(detector, [4.0])
    assert [detector.is_outlier(loss) for loss in (0.1, 5.9, 6.1)] == [False, False, True]
    feed(detector, USUAL)
    deviation = 1.4826 * 0.075
    assert [detector.is_outlier(2 + sigmas * deviation) for sigmas in (9.9, 10.1)] == [False, True]


def test_outliers_of_losses_that_are_all_alike():
    detector = SpikeDetector(CONFIG)
    feed(detector, [2.0] * 8)
    assert [detector.is_outlier(loss) for loss in (2.019, 2.021)] == [False, True]


def test_the_run_goes_back_to_the_checkpoint_of_the_run_as_it_is(tmp_path):
    for step in (4, 8, 12, 8, 9):  # 12 was saved in a spike, and the run went back to 8
        begin(tmp_path, step)
        commit(tmp_path, step, {})
        time.sleep(0.002)
    assert checkpoint_before(tmp_path, update(13)) == tmp_path / "step_00000009"
    assert checkpoint_before(tmp_path, update(9)) == tmp_path / "step_00000008"
    assert checkpoint_before(tmp_path, update(5)) == tmp_path / "step_00000004"
    assert checkpoint_before(tmp_path, update(4)) is None
    record_status(tmp_path / "step_00000009", CheckpointStatus.DOUBTED)
    assert checkpoint_before(tmp_path, update(13)) == tmp_path / "step_00000008"
