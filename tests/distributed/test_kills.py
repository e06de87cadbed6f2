"""SIGKILL of any rank at any moment ends the job on all ranks, and the same command goes on as if nothing had been."""

import dataclasses
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_run
from distributed.trainers import Death, Job, Server

from megatron.checkpoint import latest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WITHIN = 5.0  # s, as docs/faults.md states
STEPS, BATCH_TOKENS = 40, 16 * tiny_run.SEQ
EXPERTS = {"num_experts": 4, "moe_expert_parallel_size": 2, "train_tokens": STEPS * BATCH_TOKENS}


def run_to_the_end(server: Server, ranks: int, arguments: list[str]) -> None:
    job = server.start(ranks, arguments)
    assert job.wait() == [0] * ranks, job.output()
    assert "error" not in job.output()


def check_death(job: Job, rank: int, folder: Path) -> None:
    """All ended in time, the dead rank is named, and what is said of the restart is right."""
    codes = job.wait()
    assert codes[rank] == -signal.SIGKILL
    assert 0 not in codes, job.output()
    assert job.seconds_to_end() < WITHIN
    named = f"rank {rank} (host {os.uname().nodename}, process {job.pids[rank]}) died; ending"
    for other in set(range(len(codes))) - {rank}:
        assert codes[other] == 1, job.output()
        assert f"error on rank {other}: {named}" in job.output(other), job.output()
        assert "Traceback" not in job.output(other), job.output()
    found = latest(folder)
    advice = "the same command starts anew" if found is None else f"it goes on from {found.name}"
    assert advice in job.output(1 if rank == 0 else 0)


def steps_saved(folder: Path) -> int:
    found = latest(folder)
    return 0 if found is None else int(found.name.removeprefix("step_"))


def deaths(ranks: int, generator: random.Random) -> list[Death]:
    """Every phase at least once, and moments that fall anywhere, in a random order."""

    def delay() -> float:
        return generator.choice((0.0, generator.uniform(0, 0.02)))

    def anyone() -> int:
        return generator.randrange(ranks)

    chosen = [Death(anyone(), "load", 1, delay()), Death(anyone(), "validate", 1, delay())]
    chosen += [Death(rank, "write", generator.choice((1, 2)), delay()) for rank in (0, ranks - 1)]
    chosen += [Death(0, "commit", generator.choice((1, 2)), delay())]
    chosen += [Death(anyone(), "step", generator.randint(1, 5), generator.uniform(0, 0.05)) for _ in range(4)]
    chosen += [Death(anyone(), "joined", delay=generator.uniform(0, latest)) for latest in (0.1, 0.1, 0.4)]
    generator.shuffle(chosen)
    return chosen


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(4, EXPERTS | {"save_interval": 2}, marks=pytest.mark.exhaustive),
        pytest.param(
            4, EXPERTS | {"save_interval": 2, "async_save": True, "keep_last": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            2,
            EXPERTS | {"save_interval": 2, "pipeline_model_parallel_size": 2, "moe_expert_parallel_size": 1},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["synchronous saves", "asynchronous saves", "pipeline"],
)
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(server, corpus, tmp_path, ranks, flags):
    generator = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(server, ranks, tiny_run.flags(corpus, save=whole, **flags))
    arguments = tiny_run.flags(corpus, save=killed, load=killed, **flags)
    resumed_at = []
    for death in deaths(ranks, generator):
        before = steps_saved(killed)
        if death.phase == "load" and before == 0:
            death = dataclasses.replace(death, phase="joined")
        job = server.start(ranks, arguments, death)
        check_death(job, death.rank, killed)
        assert steps_saved(killed) >= before
        resumed_at.append(before)
    last = steps_saved(killed)
    assert 0 < last < STEPS, "the kills fell into the run"
    run_to_the_end(server, ranks, arguments)

    starts = [(record["resumed_at_tokens"] or 0) // BATCH_TOKENS for record in tiny_run.records(killed, "run")]
    assert set(starts) <= {*resumed_at, last}
    assert starts[-1] == last
    for kind in ("train", "valid"):
        expected, found = ({r["step"]: r["loss"] for r in tiny_run.records(f, kind)} for f in (whole, killed))
        assert found == expected
    assert not [path for path in killed.iterdir() if path.name.startswith(".step")]


@pytest.mark.parametrize("moment", ["importing", "training"])
def test_torchrun(corpus, tmp_path, moment):
    arguments = tiny_run.flags(corpus, save=tmp_path, **EXPERTS | {"train_tokens": "1M"})
    with subprocess.Popen(
        tiny_run.command(2, arguments), env=tiny_run.environment(), cwd=tiny_run.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        output = ""
        while moment == "training" and "step      4" not in output:
            output += process.stdout.readline()
        while len(ranks := children(process.pid)) < 2:
            time.sleep(0.05)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        output += process.communicate(timeout=60)[0]
    assert time.monotonic() - killed < WITHIN
    assert process.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in output
    if moment == "training":
        assert f"error on rank 0: rank 1 (host {os.uname().nodename}, process {ranks[1]}) died" in output
        assert f"To go on from step_00000003, restart with --load {tmp_path}" in output


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.exhaustive
def test_torchrun_starts_the_run_again(corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, **EXPERTS | {"train_tokens": 30 * BATCH_TOKENS})
    starter, script = tiny_run.command(2, arguments), str(tiny_run.ROOT / "pretrain_gpt_moe.py")
    starter.insert(starter.index(script), "--max-restarts=1")
    with subprocess.Popen(
        starter, env=tiny_run.environment(), cwd=tiny_run.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        output = ""
        while "step      4" not in output:
            output += process.stdout.readline()
        os.kill(children(process.pid)[1], signal.SIGKILL)
        output += process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert tiny_run.records(tmp_path, "run")[-1]["resumed_at_tokens"] >= 3 * BATCH_TOKENS
    assert tiny_run.records(tmp_path, "train")[-1]["step"] == 30
