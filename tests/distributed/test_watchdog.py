"""A run that stands still ends on all ranks, with their stacks, and names who is behind."""

import os
import re
import signal

import pytest
import tiny_run
from distributed.trainers import Death

pytestmark = pytest.mark.distributed
BATCH_TOKENS = 16 * tiny_run.SEQ
WATCHED = {"train_tokens": 60 * BATCH_TOKENS, "watchdog_factor": 3.0, "watchdog_min_seconds": 1.5}


def test_a_rank_that_gets_no_data_is_named_and_all_write_their_stacks(server, corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, **WATCHED)
    job = server.start(2, arguments, Death(rank=1, phase="step", call=12, hangs="in Python"))
    assert job.wait() == [1, 1], job.output()
    named = f"rank 1 (host {os.uname().nodename}, process {job.pids[1]}) is behind, at training/trainer.py:"
    for rank in range(2):
        said = job.output(rank)
        assert f"error on rank {rank}: update 12 has taken" in said, said
        assert named in said
        stacks = (tmp_path / "stacks" / "00000012" / f"rank_{rank:05d}.txt").read_text()
        assert "Thread" in stacks
        assert "trainer.py" in stacks
    assert "_hang" in (tmp_path / "stacks" / "00000012" / "rank_00001.txt").read_text()
    assert "it goes on from step_00000009" in job.output(0)


@pytest.mark.exhaustive
def test_a_rank_that_holds_the_gil_is_named_and_ended_with_its_stacks_all_the_same(server, corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, **WATCHED)
    job = server.start(2, arguments, Death(rank=1, phase="step", call=12, hangs="in C"))
    assert job.wait() == [1, -signal.SIGKILL]
    assert f"no answer from rank 1 (host {os.uname().nodename}, process {job.pids[1]})" in job.output(0)
    assert re.search("error on rank 1: stuck in foreign code .*_befall", job.output(1), re.DOTALL), job.output(1)
    assert "Thread" not in job.output(0), "who answers writes them into its file alone"


@pytest.mark.exhaustive
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_others(server, corpus, tmp_path, stopped):
    arguments = tiny_run.flags(corpus, save=tmp_path, **WATCHED | {"train_tokens": "1M"})
    job = server.start(2, arguments)
    server.listen_until(lambda: "step     10" in job.output(0))
    os.kill(job.pids[stopped], signal.SIGSTOP)
    server.listen_until(lambda: job.pids[1 - stopped] in server.ended, timeout=60)
    os.kill(job.pids[stopped], signal.SIGKILL)
    assert sorted(job.wait()) == [-signal.SIGKILL, 1]
    said = f"no answer from rank 1 (host {os.uname().nodename}, process {job.pids[1]})"
    assert ("rank 0 did not answer" if stopped == 0 else said) in job.output(1 - stopped)


def test_validation_and_saves_may_take_their_time(server, corpus, tmp_path):
    slow = {"train_tokens": 16 * BATCH_TOKENS, "eval_interval": 8, "save_interval": 12, "watchdog_min_seconds": 1.0}
    for phase in ("validate", "write"):
        folder = tmp_path / phase
        job = server.start(1, tiny_run.flags(corpus, save=folder, **WATCHED | slow), Death(0, phase, sleeps=1.6))
        assert job.wait() == [0], job.output()
        assert not (folder / "stacks").exists()
