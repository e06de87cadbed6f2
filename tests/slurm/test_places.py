"""Where the processes of a job of two nodes are, how they meet, and that they train the same whoever starts them."""

import re

import pytest
from slurm import jobs
from slurm.jobs import DEEPSPEED, ENDLESS, FLAGS, HOSTS, NODES, TASKS, TOKENS, TORCHRUN
from tiny_run import curve, records


def test_a_job_of_two_nodes_trains_to_its_end(undisturbed):
    assert undisturbed.shown("JobState") == "COMPLETED", undisturbed.log()
    assert undisturbed.shown("ExitCode") == "0:0"
    assert undisturbed.hosts() == HOSTS, "ranks are numbered node by node"
    gpus = {int(rank): (int(local), visible) for _, rank, _, _, local, visible in undisturbed.notes()}
    assert gpus == {rank: (rank % TASKS, "0,1") for rank in HOSTS}, "a task takes the GPU of its number on its node"
    (run,) = records(undisturbed.run, "run")
    assert (run["world_size"], run["expert_parallel"], run["config"]["training"]["seed"]) == (4, [4], 3)
    assert undisturbed.train_records()[-1]["tokens"] == TOKENS
    losses = [loss for loss, _ in curve(undisturbed.run).values()]
    assert losses[-1] < losses[0]
    assert undisturbed.stops() == ["all tokens are trained on"]
    undisturbed.assert_no_process_is_left()


def test_stages_on_different_nodes_experts_within_and_a_log_of_each_node(submit, undisturbed):
    """Rank 0 and 1 are the first stage and share its experts; 2 and 3 the second."""
    flags = f"{FLAGS} --exit-tokens {TOKENS // 5}"
    job = submit(PP=2, EP=2, SRUN_ARGS="--output=%x-%j-%N.log", EXTRA_ARGS=flags)
    assert job.wait() == "COMPLETED", job.log()
    assert job.hosts() == HOSTS
    (run,) = records(job.run, "run")
    assert (run["pipeline_parallel"], run["expert_parallel"]) == (2, [2])
    got, expected = curve(job.run), curve(undisturbed.run)
    assert max(got) == TOKENS // 5
    for tokens, pair in got.items():
        assert pair == pytest.approx(expected[tokens], rel=1e-4), tokens
    logs = {node: (job.folder / f"350M_MoE128-{job.number}-{node}.log").read_text() for node in NODES}
    assert "stopped: --exit-tokens" in logs["node1"]
    assert "step " not in logs["node2"]
    assert "step " not in job.log()


def test_spaces_in_all_names_a_link_to_the_script_and_a_second_job_in_the_same_folder(corpus, cluster, tmp_path, clean):
    """The second job ends, and the first goes on, to be requeued as if there had been no second."""
    folder, link = tmp_path / "a job", tmp_path / "link to the.sh script of mine"
    link.symlink_to(jobs.SCRIPT)
    given = {"script": link, "run_name": "the run", "RUN_NAME": "its name", **ENDLESS}
    first = jobs.submit(folder, corpus, cluster, **given)
    first.wait_for_updates(5)
    second = jobs.submit(folder, corpus, cluster, "--nodes", "1", "--ntasks-per-node", "1", "--gres", "gpu:1", **given)
    assert second.wait() == "FAILED", second.log()
    assert "error on rank 0: --save the run: another run is writing there" in second.log()
    assert "Traceback" not in second.log()
    first.signal("USR1")
    first.wait_for_restart()
    assert first.stops() == ["SIGUSR1"], first.log()
    assert records(first.run, "run")[0]["name"] == "its name"


def test_torchrun_on_each_node_trains_the_same(submit, undisturbed):
    job = submit(**TORCHRUN)
    assert job.wait() == "COMPLETED", job.log()
    hosts = job.hosts()
    assert set(hosts) == set(HOSTS)
    assert {hosts[0], hosts[2]} == set(NODES)
    assert (hosts[0], hosts[2]) == (hosts[1], hosts[3]), "ranks are numbered node by node"
    job.assert_same_losses(undisturbed)
    job.assert_no_process_is_left()


def test_the_deepspeed_launcher_with_a_hostfile_trains_the_same(submit, undisturbed):
    job = submit(**DEEPSPEED)
    assert job.wait() == "COMPLETED", job.log()
    assert (job.run / "hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert re.search(r"'node1': \[0, 1\], 'node2': \[2, 3\]", job.log()), job.log()
    job.assert_same_losses(undisturbed)
