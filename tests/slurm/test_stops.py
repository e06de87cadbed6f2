"""Jobs that are stopped from outside save, go back into the queue, and go on as if nothing had been."""

import re
import subprocess

import pytest
from slurm.jobs import ENDLESS, FLAGS, HOSTS, SRUN, TOKENS, TORCHRUN, UPDATES, eventually

STARTERS = pytest.mark.parametrize("starter", [SRUN, TORCHRUN], ids=["srun", "torchrun"])


def test_a_cancelled_job_saves_and_ends_on_both_nodes(submit):
    job = submit(**ENDLESS)
    job.wait_for_updates(5)
    job.slurm("scancel", str(job.number))
    assert job.wait(60) == "CANCELLED", job.log()
    job.assert_no_process_is_left(60)
    assert job.stops() == ["SIGTERM"], job.log()
    assert job.shown("Restarts") == "0"


def test_a_requeued_job_goes_on_where_it_was(submit, undisturbed):
    job = submit()
    job.wait_for_updates(20)
    job.slurm("scontrol", "requeue", str(job.number))
    assert job.wait() == "COMPLETED", job.log()
    assert job.shown("Restarts") == "1"
    assert job.hosts() == job.hosts(restart=1) == HOSTS
    assert job.stops() == ["SIGTERM", "all tokens are trained on"], job.log()
    first, second = job.resumed_at()
    assert first is None
    assert 0 < second < TOKENS
    job.assert_same_losses(undisturbed)


@STARTERS
def test_usr1_saves_and_the_job_requeues_itself(submit, undisturbed, starter):
    job = submit(**starter)
    job.wait_for_updates(20)
    job.signal("USR1")
    assert job.wait() == "COMPLETED", job.log()
    assert job.shown("Restarts") == "1", job.log()
    assert "stopped by SIGUSR1; requeueing the job" in job.log()
    assert job.stops() == ["SIGUSR1", "all tokens are trained on"], job.log()
    assert 0 < job.resumed_at()[1] < TOKENS
    job.assert_same_losses(undisturbed)
    job.assert_no_process_is_left()


def test_slurm_sends_usr1_before_the_time_limit(submit):
    job = submit("--time", "2", "--signal", "USR1@60", **ENDLESS)
    job.wait_for_restart()
    assert job.stops() == ["SIGUSR1"], job.log()
    made = len(job.train_records())
    job.wait_for_updates(made + 1)
    assert job.resumed_at()[1] == job.train_records()[made - 1]["tokens"]


def test_a_job_that_may_not_be_requeued_ends(submit):
    """The signal reaches every process of a task; those that read data are needed until the run has saved."""
    job = submit("--no-requeue", EXTRA_ARGS=FLAGS.replace("--num-workers 0", "--num-workers 1"), **ENDLESS)
    job.wait_for_updates(5)
    job.signal("USR1")
    assert job.wait() == "COMPLETED", job.log()
    assert job.stops() == ["SIGUSR1"], job.log()
    assert job.shown("Restarts") == "0"
    assert not re.search("rror|requeue", job.log()), job.log()


def test_its_own_time_limit_requeues_a_job_too(submit):
    job = submit(EXTRA_ARGS=f"{FLAGS} --exit-duration-in-mins 0.2", **ENDLESS)
    job.wait_for_restart()
    assert job.stops() == ["the time limit"], job.log()


@pytest.mark.parametrize(("launcher", "starters"), [("srun", set(HOSTS)), ("torchrun", {0, 1})])
def test_a_signal_before_training_requeues_a_job_once(submit, launcher, starters):
    """Nothing was trained, so nothing is lost; but a time that is too short would be too short for ever.

    The signal comes when the interpreters that srun starts, the trainers' or torchrun's, have just been started.
    """
    job = submit(LAUNCHER=launcher)
    for restart in (0, 1):
        eventually("all tasks start", lambda restart=restart: starters <= set(job.seen(restart)), job=job)
        job.signal("USR1")
        if restart == 0:
            job.wait_for_restart()
    assert job.wait() == "COMPLETED", job.log()
    assert job.shown("Restarts") == "1"
    assert job.stops() == ["SIGUSR1", "SIGUSR1"], job.log()
    assert job.train_records() == []
    assert "not requeued: no checkpoint was made since the last time" in job.log()


def test_sigterm_before_training_is_no_failure(submit):
    job = submit()
    eventually("tasks start", lambda: len(job.seen()) == len(HOSTS), job=job)
    job.signal("TERM")
    assert job.wait(60) == "COMPLETED", job.log()
    assert "SIGTERM before training began" in job.log()


@STARTERS
def test_signals_at_the_end_are_ignored(submit, starter):
    job = submit(**starter, TRAIN_TOKENS=TOKENS // 10)
    job.wait_for_updates(UPDATES // 10)
    while job.shown("JobState") == "RUNNING":
        for name in ("USR1", "TERM"):
            subprocess.run(["scancel", "--quiet", "--signal", name, str(job.number)], env=job.environment, timeout=60)
    assert job.wait() == "COMPLETED", job.log()
    assert job.stops() == ["all tokens are trained on"], job.log()
    assert job.shown("Restarts") == "0"
