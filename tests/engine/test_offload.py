"""The cores that updates in CPU memory use."""

import os

import pytest
import torch

from megatron.engine import offload


@pytest.fixture
def threads(monkeypatch):
    """What torch is told, on a machine of 32 cores and 4 GPUs."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    return told


@pytest.mark.parametrize(("variable", "size", "expected"), [(None, 1, 32), ("1", 64, 8), ("1", 2, 16), ("6", 64, None)])
def test_each_process_takes_its_share_unless_the_user_decided(monkeypatch, threads, variable, size, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    offload.use_cores(size)
    assert threads == ([] if expected is None else [expected])


def test_the_log_says_how_many():
    assert f"with {torch.get_num_threads()} threads" in offload.threads_in_words()
