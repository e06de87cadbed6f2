import pytest
import torch

from megatron.engine.base import StepResult
from megatron.model.loss import LossSums
from megatron.training.metrics import PausableTimer, StepWindow, expert_balance, mean_losses


def sums(lm: float, counts: list[int], dropped: int) -> LossSums:
    return LossSums(torch.tensor([lm, 1.0, 0.0, 1.0]), [torch.tensor(counts)], torch.tensor([dropped]))


def test_losses_are_means_over_micro_batches():
    assert mean_losses(sums(2.0, [1], 0) + sums(4.0, [1], 0))["loss"] == 3.0


def test_balance_counts_load_drops_and_dead_experts():
    balance = expert_balance(sums(1.0, [6, 2, 0, 0], 4))
    assert balance == {"load": [3.0], "dropped": [0.5], "dead": [2]}


def test_a_dense_model_has_no_balance():
    assert expert_balance(LossSums(torch.ones(4), [], torch.zeros(0))) == {}


def test_a_window_averages_updates_and_leaves_skipped_ones_out():
    window = StepWindow(flops_per_token=1e9, peak_tflops=None, devices=1)
    assert window.take() is None
    window.add(StepResult(sums(2.0, [1, 1], 0), 1e-3, 0.5), tokens=100)
    window.add(StepResult(sums(float("nan"), [1, 1], 0), 1e-3, float("nan")), tokens=100)
    record = window.take()
    assert record is not None
    assert record["loss"] == 2.0
    assert record["skipped"] == 1
    assert record["mfu"] is None
    assert window.take() is None


def test_pauses_do_not_count_as_training_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("megatron.training.metrics.time.perf_counter", lambda: clock[0])
    timer = PausableTimer()
    window = StepWindow(flops_per_token=1e12, peak_tflops=100.0, devices=2, timer=timer)
    window.add(StepResult(sums(2.0, [1], 0), 1e-3, 0.5), tokens=50)
    clock[0] = 3.0
    with timer.paused():
        clock[0] = 6.0
        with timer.paused():
            clock[0] = 8.0
    clock[0] = 10.0
    record = window.take()
    assert record is not None
    assert record["tokens_per_second"] == pytest.approx(10.0)
    assert record["tflops_per_device"] == pytest.approx(5.0)
    assert record["mfu"] == pytest.approx(0.05)


def test_a_window_that_begins_in_a_pause_begins_at_its_end(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("megatron.training.metrics.time.perf_counter", lambda: clock[0])
    timer = PausableTimer()
    window = StepWindow(flops_per_token=1.0, peak_tflops=None, devices=1, timer=timer)
    with timer.paused():
        clock[0] = 5.0
        window.clear()
        clock[0] = 7.0
    clock[0] = 9.0
    window.add(StepResult(sums(2.0, [1], 0), 1e-3, 0.5), tokens=50)
    record = window.take()
    assert record is not None
    assert record["seconds_per_step"] == pytest.approx(2.0)
