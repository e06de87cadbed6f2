"""What the tests on a SLURM cluster share: the cluster, a dataset, and a job that nobody disturbs."""

import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpus import write_jsonl
from slurm import jobs
from tiny_run import ROOT, WORDS, make_tokenizer


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands reach a cluster of three nodes, of which jobs ask for two."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster is not left behind then either
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, jobs.cluster(Path(folder)) as environment:
        yield environment


@pytest.fixture(scope="session")
def corpus(cluster, tmp_path_factory) -> Path:
    """A folder with a tokenizer and a dataset, made of text as a user makes it."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(7)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 80))) for _ in range(200)]
    text = write_jsonl(folder / "text.jsonl", texts)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(text), "--append-eod"]
    command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(make_tokenizer(folder))]
    subprocess.run([*command, "--output-prefix", str(folder / "text")], check=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def undisturbed(cluster, corpus, tmp_path_factory) -> jobs.Job:
    """A job that has come to its end by itself."""
    job = jobs.submit(tmp_path_factory.mktemp("undisturbed"), corpus, cluster)
    job.wait()
    return job


@pytest.fixture
def clean(cluster) -> Iterator[None]:
    """No job is left when the test ends, whatever it submitted and however it ended."""
    yield
    subprocess.run(["scancel", "--quiet", "--me"], env=cluster, capture_output=True, timeout=60)
    jobs.eventually("no job left", lambda: not jobs.slurm(cluster, "squeue", "--noheader"), 60)


@pytest.fixture
def submit(cluster, corpus, tmp_path, clean) -> Callable[..., jobs.Job]:
    """:func:`jobs.submit` in a folder of the test's own."""

    def submit(*words: str, **variables: object) -> jobs.Job:
        return jobs.submit(tmp_path / "job", corpus, cluster, *words, **variables)

    return submit
