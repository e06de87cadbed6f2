"""What the trainer says of a run at its start."""

from types import SimpleNamespace

import pytest
import torch

from megatron.planning.measured import STEPS, VOCAB, run_of
from megatron.training.estimate import estimate


def topology(kind: str, world: int = 1) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(kind), launch=SimpleNamespace(world_size=world))


@pytest.fixture
def gpu(monkeypatch):
    """Plays a GPU of a name and of so many bytes."""

    def play(name: str, memory: float) -> None:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=memory)
        )
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    return play


def test_on_a_cpu_there_are_no_times():
    said = estimate(run_of("350M:4"), topology("cpu"), VOCAB)
    assert "parameters 356M" in said
    assert "speed" not in said
    assert "warning" not in said


def test_on_a_known_gpu(gpu):
    gpu("NVIDIA H200", 150.1e9)
    said = estimate(run_of("350M:16", train_tokens=10**9), topology("cuda"), VOCAB)
    assert "34.4 GB a GPU of 150 (fits" in said
    assert f"about {16 * 2048 / STEPS['350M:16']:.0f}K tokens/s" in said  # as measured


def test_on_a_gpu_that_is_too_small(gpu):
    gpu("NVIDIA A100-SXM4-40GB", 42.3e9)
    said = estimate(run_of("1.3B+8:8"), topology("cuda"), VOCAB)
    assert "DOES NOT FIT" in said
    assert "warning: the run may not fit" in said


@pytest.mark.parametrize("name", ["Some GPU", "Tesla V100-SXM2-32GB"])
def test_on_a_gpu_without_a_known_peak(gpu, name):
    gpu(name, 34e9)
    assert "speed" not in estimate(run_of("350M:1"), topology("cuda"), VOCAB)
