"""The array that makes shards of a corpus, and the job that merges them when all are made."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import english, write_jsonl
from slurm import jobs
from tiny_run import ROOT

from megatron.config import DataConfig
from megatron.data.preprocess import preprocess

SCRIPT = ROOT / "examples_moe" / "slurm" / "preprocess_array.sh"
SHARDS = 3
STAYS = 1  # the shard whose task stands still, the first time, when it has noted how far it is
# Notes its process, saves the journal often, and plays the tool; what merges is a task of no shards' array.
INTERPRETER = f"""#!{sys.executable}
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from megatron.data import journal, preprocess
preprocess.JOURNAL_SECONDS = 0
preprocess.read_batches.__kwdefaults__["batch_bytes"] = 2000
task = os.environ["SLURM_ARRAY_TASK_ID"]
first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
stays = first and "--shard-index" in sys.argv and task == os.environ.get("STAYS")
saved, save = [], journal.Journal.save
def note(self, point):
    save(self, point)
    saved.append(point)
    if stays and len(saved) == 3:
        open(os.environ["SEEN"], "w").write(str(os.getpid()))
        time.sleep(600)
journal.Journal.save = note
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass
class Array:
    """The two jobs, submitted from a folder with the corpus."""

    folder: Path
    environment: dict[str, str]
    shards: int = 0
    merge: int = 0

    def submit(self, **variables: object) -> None:
        """Submit both as the head of the script says; their environment gets more variables."""
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        self.shards = self._sbatch(environment, f"--array=0-{SHARDS - 1}", str(SCRIPT))
        after = [f"--dependency=afterok:{self.shards}", "--kill-on-invalid-dep=yes", "--array=0"]
        self.merge = self._sbatch(environment, *after, str(SCRIPT), "merge")

    def states(self, job: int) -> dict[int, str]:
        """The state of each task."""
        said = jobs.slurm(self.environment, "scontrol", "--oneliner", "show", "job", str(job))
        found = [dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in said.splitlines()]
        return {int(task["ArrayTaskId"]): task["JobState"] for task in found if task["ArrayTaskId"].isdigit()}

    def wait(self) -> tuple[list[str], str]:
        """Wait until nothing is left to do; returns the states of the shards, and of the merge."""

        def over() -> bool:
            queue = jobs.slurm(self.environment, "squeue", "--noheader", "--format=%A %T")
            return not queue.strip()

        jobs.eventually("all over", over)
        states = self.states(self.shards)
        return [states[shard] for shard in sorted(states)], self.states(self.merge)[0]

    def wait_until_one_stays(self) -> int:
        """Wait until the task that is to be disturbed has saved something; returns its process."""
        seen = self.folder / "seen"
        jobs.eventually("a shard that stays", lambda: seen.exists() and bool(seen.read_text()))
        return int(seen.read_text())

    def log(self, job: int, task: int) -> str:
        return (self.folder / f"preprocess-{job}_{task}.log").read_text()

    def made(self) -> dict[str, bytes]:
        """The merged files."""
        paths = [self.folder / f"out_text_document{suffix}" for suffix in (".bin", ".idx")]
        return {path.suffix: path.read_bytes() for path in paths if path.exists()}

    def _sbatch(self, environment: dict[str, str], *words: str) -> int:
        command = ["sbatch", "--parsable", "--cpus-per-task=2", *words]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)


@pytest.fixture
def array(cluster, clean, tmp_path) -> Array:
    """Not yet submitted."""
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", english(300, seed=1))
    write_jsonl(tmp_path / "corpus" / "b.jsonl.gz", english(100, seed=2))
    write_jsonl(tmp_path / "corpus" / "c.jsonl", english(200, seed=3))
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    given = {"INPUT": "corpus/*.jsonl corpus/*.gz", "OUTPUT": "out", "TOKENIZER": "--tokenizer-type ByteTokenizer"}
    given |= {"ROOT": str(ROOT), "PYTHON": str(interpreter), "SEEN": str(tmp_path / "seen")}
    return Array(tmp_path, cluster | given)


@pytest.fixture
def expected(array) -> Callable[[], dict[str, bytes]]:
    """What one run makes of the corpus."""

    def expected(**options: object) -> dict[str, bytes]:
        inputs = [str(array.folder / "corpus" / pattern) for pattern in ("*.jsonl", "*.gz")]
        data = DataConfig(tokenizer_type="ByteTokenizer")
        prefix = preprocess(inputs, str(array.folder / "one"), data, append_eod=True, workers=0, **options).prefixes[0]
        return {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")}

    return expected


def test_shards_are_merged_into_what_one_run_makes(array, expected):
    array.submit()
    assert array.wait() == (["COMPLETED"] * SHARDS, "COMPLETED"), array.log(array.shards, 0)
    assert array.made() == expected()
    array.submit()
    assert array.wait() == (["COMPLETED"] * SHARDS, "COMPLETED")
    for log in (array.log(array.shards, 0), array.log(array.merge, 0)):
        assert "nothing to do" in log


@pytest.mark.parametrize("how", ["requeued", "near its time limit"])
def test_a_task_goes_on_where_it_was(how, array, expected):
    array.submit(STAYS=STAYS)
    array.wait_until_one_stays()
    task = f"{array.shards}_{STAYS}"
    words = ("scontrol", "requeue", task) if how == "requeued" else ("scancel", "--batch", "--signal=USR1", task)
    jobs.slurm(array.environment, *words)
    assert array.wait() == (["COMPLETED"] * SHARDS, "COMPLETED")
    log = array.log(array.shards, STAYS)
    assert "going on after" in log
    assert (f"the time limit is near: requeueing shard {STAYS} of {SHARDS}" in log) == (how != "requeued")
    assert array.made() == expected()


def test_a_task_that_is_killed_keeps_the_merge_from_running_until_it_is_made_again(array, expected):
    array.submit(STAYS=STAYS)
    os.kill(array.wait_until_one_stays(), 9)
    states = ["COMPLETED"] * SHARDS
    states[STAYS] = "FAILED"
    assert array.wait() == (states, "CANCELLED")
    assert f"error: shard {STAYS} of {SHARDS} failed (exit status 137), so the shards are not merged" in array.log(
        array.shards, STAYS
    )
    assert array.made() == {}
    array.submit()
    assert array.wait() == (["COMPLETED"] * SHARDS, "COMPLETED")
    assert "going on after" in array.log(array.shards, STAYS)
    assert "nothing to do" in array.log(array.shards, 0)
    assert array.made() == expected()


def test_broken_lines_in_one_shard_keep_the_merge_from_running(array, expected):
    path = array.folder / "corpus" / "c.jsonl"
    path.write_bytes(path.read_bytes() + b'{"title": "no text"}\n' * 3)
    array.submit(INPUT="corpus/*.gz corpus/*.jsonl")
    states, merge = array.wait()
    assert (states, merge) == (["COMPLETED", "COMPLETED", "FAILED"], "CANCELLED")
    log = array.log(array.shards, 2)
    assert "no key 'text'; its keys: 'title'" in log
    assert "error: shard 2 of 3 failed (exit status 1), so the shards are not merged. Mend it" in log
    assert "Traceback" not in log
    assert array.made() == {}
    array.submit(INPUT="corpus/*.gz corpus/*.jsonl", EXTRA_ARGS="--max-rejected 0.1")
    assert array.wait() == (["COMPLETED"] * SHARDS, "COMPLETED")
    assert "3 broken lines were left out" in array.log(array.shards, 2)


def test_an_array_of_one_task(tmp_path):
    variables = {"INPUT": "x", "OUTPUT": "x", "TOKENIZER": "x", "ROOT": str(ROOT)}
    variables |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    done = subprocess.run(["bash", str(SCRIPT)], env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "one task makes no shards" in done.stderr
