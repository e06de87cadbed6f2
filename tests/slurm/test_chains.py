"""Runs as several jobs: chains of them, one after the other, and arrays."""

import subprocess

import pytest
from slurm import jobs
from slurm.jobs import FLAGS, SIZE, TIME, TOKENS, UPDATES, Job, eventually
from tiny_run import ROOT, records

CHAIN = ROOT / "examples_moe" / "slurm" / "chain.sh"
ARRAY = ROOT / "examples_moe" / "slurm" / "array.sh"


@pytest.fixture
def chain(cluster, corpus, tmp_path, clean):
    """Runs chain.sh; returns its jobs."""
    folder = tmp_path / "chain"

    def chain(links: int, **variables: object) -> list[Job]:
        environment = jobs.settings(folder, corpus, cluster, **variables)
        command = ["bash", str(CHAIN), str(links), *TIME, *SIZE, str(jobs.SCRIPT), "--seed", "3"]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("link ")]
        return [Job(int(line.rpartition(" ")[2]), folder, environment) for line in lines]

    return chain


def test_links_go_on_from_each_other_and_end_when_the_run_is_finished(chain, undisturbed):
    first, second, third = chain(3)
    first.wait_for_updates(20)
    assert second.shown("Dependency") == f"afterany:{first.number}(unfulfilled)"
    first.signal("USR1")
    assert first.wait() == "COMPLETED", first.log()
    assert first.shown("Restarts") == "0", "the next link goes on"
    assert second.wait() == "COMPLETED", second.log()
    assert second.stops() == ["SIGUSR1", "all tokens are trained on"]
    assert 0 < second.resumed_at()[1] < TOKENS
    second.assert_same_losses(undisturbed)
    assert third.wait() == "COMPLETED", third.log()
    assert third.log().endswith(f"run: finished, {TOKENS} tokens are trained on\n")
    assert len(third.resumed_at()) == 2, "no third start"
    assert chain(2) == [], "nothing is submitted for a finished run"
    assert len(chain(1, TRAIN_TOKENS=2 * TOKENS, DEPENDENCY="afterok")) == 1, "but for a longer one"


def test_a_link_that_fails_ends_a_chain_with_afterok(chain):
    first, second = chain(2, DEPENDENCY="afterok", DATA_PATH="missing", LAUNCHER="torchrun")
    assert first.wait() == "FAILED"
    assert "error on all ranks: --data-path missing: no file missing.idx" in first.log(), first.log()
    assert "Traceback" not in first.log()
    assert second.wait() == "CANCELLED"
    assert second.log() == "(no log yet)"


def test_an_array_is_a_run_for_each_task_and_a_task_requeues_itself_alone(cluster, corpus, tmp_path, clean):
    flags = FLAGS.replace("--lr 5e-3", "")
    variables = {"RATES": "1e-3 2e-3", "SEEDS": "3", "SAVE": "sweep", "EXTRA_ARGS": flags}
    environment = jobs.settings(tmp_path, corpus, cluster, **variables)
    command = ["sbatch", "--parsable", *TIME, "--array", "0-1", "--nodes", "1", "--ntasks-per-node", "2"]
    command += ["--cpus-per-task", "1", "--gres", "gpu:1", str(ARRAY)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    array = int(done.stdout)
    names = [f"{array}_{task}" for task in (0, 1)]
    rates, tasks = ["1e-3", "2e-3"], []
    for name, rate in zip(names, rates, strict=True):
        log, run = f"sweep-{name.replace('_', '-')}.log", f"sweep/lr{rate}-seed3"
        eventually("task started", lambda name=name: shown(name, environment, "JobState") == "RUNNING")
        number = int(shown(name, environment, "JobId"))
        tasks.append(Job(number, tmp_path, environment, log, run))
    signalled, other = tasks[1], tasks[0]
    signalled.wait_for_updates(10)
    subprocess.run(["scancel", "--signal", "USR1", names[1]], env=environment, check=True, timeout=60)
    for name, job in zip(names, tasks, strict=True):
        eventually("task over", lambda name=name: shown(name, environment, "JobState") == "COMPLETED", job=job)
    assert signalled.stops() == ["SIGUSR1", "all tokens are trained on"], signalled.log()
    assert other.stops() == ["all tokens are trained on"], other.log()
    assert [shown(name, environment, "Restarts") for name in names] == ["0", "1"]
    for job, rate in zip(tasks, rates, strict=True):
        config = records(job.run, "run")[0]["config"]
        assert (config["optimizer"]["lr"], config["training"]["seed"]) == (float(rate), 3)
        assert len({record["step"] for record in job.train_records()}) == UPDATES


def shown(name: str, environment: dict[str, str], field: str) -> str:
    """A field of ``scontrol show job`` for a task of an array."""
    fields = jobs.slurm(environment, "scontrol", "--oneliner", "show", "job", name).split()
    return next(text.partition("=")[2] for text in fields if text.startswith(f"{field}="))
