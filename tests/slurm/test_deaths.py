"""Jobs of which a process or a node dies: all end, nothing hangs, and a job that lost a node starts again."""

import re

import pytest
from slurm import jobs
from slurm.jobs import ENDLESS, HOSTS, NODES, SPARE, SRUN, TORCHRUN, eventually, kill


@pytest.mark.parametrize("starter", [SRUN, TORCHRUN], ids=["srun", "torchrun"])
def test_a_process_that_is_killed_ends_the_job_on_both_nodes(submit, starter):
    job = submit(**starter, **ENDLESS)
    job.wait_for_updates(5)
    host, pid = job.seen()[3]
    kill(pid)
    assert job.wait(60) == "FAILED", job.log()
    job.assert_no_process_is_left()
    assert re.search(rf"error on rank [012]: rank 3 \(host {host}, process {pid}\) died; ending", job.log()), job.log()
    assert job.shown("Restarts") == "0"


def test_a_process_that_is_killed_before_all_have_met_ends_the_job(submit):
    job = submit(**ENDLESS)
    eventually("tasks start", lambda: len(job.seen()) == len(HOSTS), job=job)
    kill(job.seen()[0][1])
    assert job.wait(60) == "FAILED", job.log()
    job.assert_no_process_is_left()


@pytest.fixture
def lost(cluster):
    """The node that the test may lose; it comes back. To be set up first, so that no job is left by then."""
    yield NODES[1]
    jobs.control(cluster, "restore", NODES[1])


def test_a_job_that_loses_a_node_starts_again_on_others(lost, submit, cluster, undisturbed):
    """The ranks end at once; SLURM requeues the job when the node has not answered for SlurmdTimeout."""
    job = submit()
    job.wait_for_updates(60)
    jobs.control(cluster, "lose", lost)
    died = re.compile(r"error on rank [01]: rank [23] \(host node2, process \d+\) died")
    eventually("the death is told", lambda: died.search(job.log()), 20, job)
    assert job.wait() == "COMPLETED", job.log()
    assert job.shown("Restarts") == "1"
    assert set(job.hosts(restart=1).values()) == {NODES[0], SPARE}
    assert job.resumed_at()[1] > 0
    job.assert_same_losses(undisturbed)
