"""Loader processes: the same batches, no hang at any kind of end, and signals to the whole job do not stop them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from megatron.config import RunConfig
from megatron.data.loader import batches

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fork_server():
    """The loader starts the fork server of its process with signals blocked: others' must not be there already."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


class Numbers:
    """A dataset whose sample i is full of i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((4,), index)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(4), "position_ids": tokens}


def config(workers: int) -> RunConfig:
    run = RunConfig()
    run.data.num_workers, run.training.micro_batch_size = workers, 2
    return run


def test_processes_give_the_same_batches():
    here = list(batches(Numbers(50), config(0), 1, 2, 4))
    there = list(batches(Numbers(50), config(2), 1, 2, 4))
    assert [batch["sample_index"] for batch in there] == list(range(6, 50, 4))
    for one, other in zip(here, there, strict=True):
        assert set(one) == set(other) == {"tokens", "labels", "loss_mask", "sample_index"}
        assert one["tokens"].tolist() == [[one["sample_index"] + row] * 4 for row in range(2)]
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(one[name], other[name])
        assert type(other["sample_index"]) is int


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive after {seconds} s: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.05)


def test_processes_outlive_the_signals_of_a_scheduler_and_end_with_the_iterator():
    from multiprocessing import forkserver

    iterator = batches(Numbers(200), config(2), 0, 1, 0)
    first = next(iterator)
    workers = [process.pid for process in iterator._iterator._workers]
    server = forkserver._forkserver._forkserver_pid
    for pid in (*workers, server):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, number)
    time.sleep(0.5)
    assert [batch["sample_index"] for batch in (first, *iterator)] == list(range(0, 200, 2))
    iterator = batches(Numbers(200), config(2), 0, 1, 0)
    next(iterator)
    workers = [process.pid for process in iterator._iterator._workers]
    assert all(map(alive, workers))
    del iterator
    wait_for_end(workers, 10)


PROGRAM = """
    import sys
    sys.path.insert(0, {folder!r})
    from test_loader import Numbers, batches, config

    if __name__ == "__main__":
        iterator = batches(Numbers(2000), config(1), 0, 1, 0)  # a global, so it lives to the very end
        next(iterator)
        print(*[process.pid for process in iterator._iterator._workers], flush=True)
        {end}
"""


ENDS = {"pass": 0, "1 / 0": 1, "sys.stdin.read()": -signal.SIGKILL}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """One with each end, all started at once: nearly all of their time is imports."""
    started, pipes = {}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for end in ENDS:
        program = tmp_path_factory.mktemp("program") / "program.py"
        program.write_text(textwrap.dedent(PROGRAM).format(folder=str(Path(__file__).parent), end=end))
        started[end] = subprocess.Popen([sys.executable, program], **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("end", ENDS)
def test_programs_end(end, programs):
    """With an iterator still open: normally, with an exception, and killed."""
    process = programs[end]
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 1
    if "stdin" in end:
        process.kill()
    process.communicate(timeout=60)
    assert process.returncode == ENDS[end]
    wait_for_end(workers, 30)
