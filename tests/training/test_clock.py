import pytest

from megatron.config import TrainingConfig
from megatron.training.clock import Clock, Step, global_batch_size, total_samples


def test_without_a_ramp_up_the_batch_is_constant():
    config = TrainingConfig(global_batch_size=8)
    assert {global_batch_size(config, samples) for samples in range(0, 100, 8)} == {8}


def test_ramp_up_holds_each_batch_size_for_the_same_number_of_samples():
    config = TrainingConfig(global_batch_size=8, rampup_batch_size=(2, 2, 30))
    sizes = {samples: global_batch_size(config, samples) for samples in range(0, 60)}
    assert [sizes[0], sizes[9], sizes[10], sizes[19], sizes[20], sizes[29], sizes[30]] == [2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize("rampup", [None, (2, 2, 30), (4, 4, 1000)])
def test_total_samples_is_where_stepping_first_reaches_the_tokens(rampup):
    config = TrainingConfig(global_batch_size=8, rampup_batch_size=rampup, train_tokens=16 * 101)
    samples = 0
    while samples * 16 < 16 * 101:
        samples += global_batch_size(config, samples)
    assert total_samples(config, seq_length=16) == samples


def test_intervals_are_measured_in_samples_so_small_batches_cross_them_less_often():
    clock = Clock(seq_length=16)
    steps = [clock.advance(2) for _ in range(32)]
    assert [step.end for step in steps if step.crosses(interval=2, batch_size=8)] == [16, 32, 48, 64]
    assert not Step(1, 0, 10**6).crosses(interval=0, batch_size=8)


def test_an_update_moves_the_clock():
    clock = Clock(seq_length=16, samples=48, steps=5)
    assert clock.advance(8) == Step(6, 48, 56)
    assert (clock.samples, clock.steps) == (56, 6)


def test_state_round_trip():
    clock = Clock(seq_length=16, samples=48, steps=5, skipped=1)
    assert Clock(**clock.state()) == clock
    assert clock.tokens == 768
