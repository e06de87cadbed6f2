"""A launch script as a job of a real SLURM cluster: two nodes, two tasks on each, four experts over all of them."""

import re

import pytest
from slurm.jobs import NODES, TASKS, TOKENS, TORCHRUN, UPDATES, kill
from tiny_run import curve, records

HOSTS = {rank: NODES[rank // TASKS] for rank in range(TASKS * len(NODES))}


def hosts(job, restart: int = 0) -> dict[int, str]:
    return {rank: host for rank, (host, _) in job.seen(restart).items()}


def stops(job) -> list[str]:
    return [record["reason"] for record in records(job.run, "stop")]


def assert_same_losses(job, reference) -> None:
    """Every update is there, and what stands last of each is what it is without an interruption."""
    got, expected = curve(job.run), curve(reference.run)
    assert list(expected) == sorted(expected)
    assert sorted(got) == list(expected)
    for tokens, pair in expected.items():
        assert got[tokens] == pytest.approx(pair, rel=1e-5), tokens


def test_a_job_of_two_nodes_trains_to_its_end(undisturbed):
    assert undisturbed.shown("JobState") == "COMPLETED", undisturbed.log()
    assert undisturbed.shown("ExitCode") == "0:0"
    assert hosts(undisturbed) == HOSTS, "ranks are numbered node by node"
    (run,) = records(undisturbed.run, "run")
    assert (run["world_size"], run["expert_parallel"], run["config"]["training"]["seed"]) == (4, [4], 3)
    assert undisturbed.train_records()[-1]["tokens"] == TOKENS
    losses = [loss for loss, _ in curve(undisturbed.run).values()]
    assert losses[-1] < losses[0]
    assert "all tokens are trained on" in stops(undisturbed)
    undisturbed.assert_no_process_is_left()


def test_a_task_that_is_killed_ends_the_job_on_both_nodes(submit):
    job = submit()
    job.wait_for_updates(5)
    host, pid = job.seen()[3]
    kill(pid)
    assert job.wait(30) == "FAILED", job.log()
    job.assert_no_process_is_left()
    assert re.search(rf"error on rank [012]: rank 3 \(host {host}, process {pid}\) died; ending", job.log()), job.log()
    assert len(job.train_records()) < UPDATES


def test_a_cancelled_job_saves_and_ends_on_both_nodes(submit, undisturbed):
    job = submit()
    job.wait_for_updates(5)
    job.slurm("scancel", str(job.number))
    assert job.wait(60) == "CANCELLED", job.log()
    job.assert_no_process_is_left(60)
    assert stops(job) == ["SIGTERM"], job.log()


def test_a_requeued_job_goes_on_where_it_was(submit, undisturbed):
    job = submit()
    job.wait_for_updates(20)
    job.slurm("scontrol", "requeue", str(job.number))
    assert job.wait() == "COMPLETED", job.log()
    assert job.shown("Restarts") == "1"
    assert hosts(job) == hosts(job, restart=1) == HOSTS
    assert stops(job) == ["SIGTERM", "all tokens are trained on"], job.log()
    first, second = records(job.run, "run")
    assert first["resumed_at_tokens"] is None
    assert 0 < second["resumed_at_tokens"] < TOKENS
    assert_same_losses(job, undisturbed)


def test_usr1_saves_and_the_same_command_goes_on(submit, undisturbed):
    job = submit()
    job.wait_for_updates(20)
    job.slurm("scancel", "--signal", "USR1", str(job.number))
    assert job.wait(60) == "COMPLETED", job.log()
    again = submit()
    assert again.wait() == "COMPLETED", again.log()
    assert stops(job) == ["SIGUSR1", "all tokens are trained on"], job.log()
    assert_same_losses(job, undisturbed)


def test_slurm_sends_usr1_before_the_time_limit(submit):
    job = submit("--time", "2", "--signal", "USR1@60", TRAIN_TOKENS="800K")
    assert job.wait() == "COMPLETED", job.log()
    assert stops(job) == ["SIGUSR1"], job.log()


def test_torchrun_on_each_node_trains_the_same(submit, undisturbed):
    job = submit(**TORCHRUN)
    assert job.wait() == "COMPLETED", job.log()
    assert set(hosts(job)) == set(HOSTS)
    assert {hosts(job)[rank] for rank in (0, 1)} != {hosts(job)[rank] for rank in (2, 3)}
    assert_same_losses(job, undisturbed)
    job.assert_no_process_is_left()


def test_torchrun_ends_when_a_process_is_killed(submit):
    job = submit(**TORCHRUN)
    job.wait_for_updates(5)
    host, pid = job.seen()[3]
    kill(pid)
    assert job.wait(60) == "FAILED", job.log()
    job.assert_no_process_is_left()
    assert f"rank 3 (host {host}, process {pid}) died; ending" in job.log(), job.log()


def test_torchrun_saves_when_the_job_is_signalled(submit, undisturbed):
    job = submit(**TORCHRUN)
    job.wait_for_updates(20)
    job.slurm("scancel", "--signal", "USR1", str(job.number))
    job.wait(60)
    job.assert_no_process_is_left()
    assert len(stops(job)) == 1, job.log()
    again = submit(**TORCHRUN)
    assert again.wait() == "COMPLETED", again.log()
    assert_same_losses(job, undisturbed)
