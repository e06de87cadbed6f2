"""Zero-shot evaluation as a job of two nodes: experts shared inside a node, a process killed, and the next job."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import saved_model
from slurm import jobs
from slurm.jobs import HOSTS, SIZE, SRUN, TIME, TORCHRUN, Job, eventually
from tiny_run import ROOT
from zero_shot_data import write_data

from benchmarks.zero_shot import compare
from megatron.config import ModelConfig
from megatron.evaluation.harness import Evaluation, evaluate
from megatron.evaluation.tasks import LOCAL

SCRIPT = ROOT / "examples_moe" / "eval_zero_shot.sh"
SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, init_method_std=0.2)
PASSAGES = 1500  # of LAMBADA, so that a job lasts long enough to be disturbed
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, data, and in ``alone`` what one process finds."""
    folder = tmp_path_factory.mktemp("evaluation")
    saved = saved_model.save_model(folder, shape=SHAPE)
    data = write_data(folder / "data")
    passages = ({"text": f"w{n % 120} w{n // 120} w{n % 7} w{n % 11}"} for n in range(PASSAGES))
    (data / "lambada_test_openai.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    where = (str(saved.folder), str(folder / "alone"), tuple(LOCAL), str(data))
    evaluate(Evaluation(*where, batch_size=4, max_gen_toks=NEW, device="cpu", log_samples=True))
    return folder


@pytest.fixture
def submit(cluster, folder, tmp_path, clean) -> Callable[..., Job]:
    """``sbatch`` eval_zero_shot.sh for two nodes of two tasks; all of a test's jobs have one output."""

    def submit(**variables: object) -> Job:
        wanted = {"LOAD": folder / "checkpoints", "OUTPUT": "scores", "DATA_DIR": folder / "data", "EP": 2} | variables
        environment = jobs.settings(tmp_path / "job", folder, cluster, **wanted)
        words = ["--device", "cpu", "--batch-size", "4", "--max-gen-toks", str(NEW), "--log-samples"]
        command = ["sbatch", "--parsable", *TIME, *SIZE, str(SCRIPT), *words]
        cwd = tmp_path / "job"
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return Job(int(done.stdout), cwd, environment, "eval_zero_shot-{}.log", "scores")

    return submit


def assert_complete(job: Job, folder: Path) -> None:
    """The job has ended well, with what one process finds."""
    assert job.wait(2 * jobs.PATIENCE) == "COMPLETED", job.log()
    ours, alone = (json.loads((where / "results.json").read_text()) for where in (job.run, folder / "alone"))
    for task in LOCAL:
        row, wrong = compare(task, 4, ours, alone)
        assert wrong == []
        assert row.documents == (PASSAGES if task == "lambada_openai" else 2)
    assert "| **checkpoints** |" in (job.run / "results.md").read_text()
    assert len((job.run / "requests.jsonl").read_bytes().splitlines()) == len(
        (folder / "alone" / "requests.jsonl").read_bytes().splitlines()
    )
    job.assert_no_process_is_left()


def answers(job: Job) -> bytes:
    """The finished requests, as far as they are on disk."""
    log = job.run / "requests.jsonl"
    return log.read_bytes() if log.exists() else b""


def test_a_killed_process_ends_the_job_and_the_next_job_goes_on(submit, folder):
    job = submit(**SRUN)
    eventually("100 answers", lambda: answers(job).count(b"\n") > 100, job=job)
    jobs.kill(job.seen()[3][1])
    assert job.wait(30) == "FAILED", job.log()
    job.assert_no_process_is_left()
    assert job.hosts() == HOSTS, "experts are shared by the two processes of a node"
    kept = answers(job).rpartition(b"\n")[0]
    assert 100 < kept.count(b"\n") < PASSAGES, "killed in the middle"
    assert not (job.run / "results.json").exists()
    following = submit(**SRUN)
    assert_complete(following, folder)
    assert answers(following).startswith(kept)


def test_torchrun_on_each_node_finds_the_same(submit, folder):
    job = submit(**TORCHRUN)
    assert_complete(job, folder)
    assert set(job.hosts()) == set(HOSTS)


def test_what_is_missing_ends_the_job_with_its_name(submit, folder):
    job = submit(DATA_DIR=folder, **SRUN)
    assert job.wait() == "FAILED"
    assert f"error: lambada_openai: {folder} holds no lambada_test_openai.jsonl" in job.log()
    assert not job.run.exists()
