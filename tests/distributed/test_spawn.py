"""The helper that tests on several processes stand on: results come back, failures are told and hangs end."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import ChildError, run_distributed

pytestmark = pytest.mark.distributed


def add_ranks(start):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = start + rank
    dist.all_reduce(total)
    return rank, world_size, total, os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def fail_on_the_last():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("the dog ate it")
    dist.barrier()


def wait_for_nobody():
    if dist.get_rank() == 0:
        time.sleep(600)


def test_results_come_back_in_the_order_of_ranks():
    results = run_distributed(add_ranks, 2, torch.ones(3))
    assert [(rank, size, threads, used) for rank, size, _, threads, used in results] == [(0, 2, "1", 1), (1, 2, "1", 1)]
    for result in results:
        assert torch.equal(result[2], torch.full((3,), 3.0))


def test_a_failure_carries_its_traceback_and_ends_all():
    start = time.monotonic()
    with pytest.raises(ChildError, match=r"(?s)process 1.*fail_on_the_last.*RuntimeError: the dog ate it"):
        run_distributed(fail_on_the_last, 2)
    assert time.monotonic() - start < 50


def test_a_hang_is_ended_and_told():
    with pytest.raises(ChildError, match=r"(?s)none raised within 6 s.*exit codes.*wait_for_nobody"):
        run_distributed(wait_for_nobody, 2, timeout=6)
